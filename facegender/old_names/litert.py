"""Old name of `facegender.inference.litert`, for models logged before the move."""

from facegender.inference.litert import load_litert

__all__ = ["load_litert"]
