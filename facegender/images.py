"""Decoding: from the bytes of any image file to the uint8 RGB array that the model takes."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# A declared size past this is refused before a pixel is decoded (a decompression bomb).
MAX_PIXELS = 100_000_000


class InvalidImage(ValueError):
    """An image that cannot be decoded; the message is the reason, without the file's name."""


def decode_image(source: bytes | Path, size: int) -> np.ndarray:
    """Decode an image as the model sees it: upright, RGB, `size` x `size`.

    The orientation tag of EXIF is applied, transparency is laid over white, other colour modes
    become RGB, and the picture is resized with an antialiasing filter, without keeping its aspect
    ratio (as the study's generator did). Training, prediction and serving all decode here.

    Args:
        source: the file's bytes, or its path.
        size: pixels a side.

    Returns:
        uint8 array of shape (size, size, 3).

    Raises:
        InvalidImage: the bytes are no image that can be decoded, or too large a one.
    """
    file = source if isinstance(source, Path) else io.BytesIO(source)
    try:
        with warnings.catch_warnings():
            # Pillow only warns between its limit and twice that; the check below is ours.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise InvalidImage(f"too large: {image.width}x{image.height} pixels")
            # Lets JPEG decode at a fraction of its size, never below twice what is asked for.
            image.draft("RGB", (2 * size, 2 * size))
            # EXIF is read before conversions, some of which drop it.
            ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image)
            return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC))
    except InvalidImage:
        raise
    except UnidentifiedImageError:
        raise InvalidImage("not an image in a known format") from None
    except Image.DecompressionBombError:
        raise InvalidImage("too large: decompression bomb") from None
    except FileNotFoundError:
        raise InvalidImage("no such file") from None
    # Decoders of damaged files raise what they like; each means that this file cannot be read.
    except Exception as error:
        raise InvalidImage(f"cannot be decoded: {_reason(error)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow clips 16-bit greys at 255 instead of scaling them.
        return Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).astype(np.uint8)).convert(
            "RGB"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    # Without the copy that `convert` makes even so.
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    # Messages of OSError can name the file; reasons must not depend on where it lies.
    return (error.strerror if isinstance(error, OSError) else None) or (
        str(error).splitlines()[0] if str(error) else type(error).__name__
    )


def encode_png(pixels: np.ndarray) -> bytes:
    """Return an image, uint8 of shape (height, width, 3), as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
