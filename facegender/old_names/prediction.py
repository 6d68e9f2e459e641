"""Old name of `facegender.inference.predictor`, for models logged before the move."""

from facegender.inference.predictor import label_of

__all__ = ["label_of"]
