"""Old name of `facegender.data.images`, for models logged before the move."""

from facegender.data.images import InvalidImage, decode_image

__all__ = ["InvalidImage", "decode_image"]
