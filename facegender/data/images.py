"""Decoding: from the bytes of any image file to the uint8 RGB array that the model takes."""

import io
import re
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import (
    # Registered on import. Otherwise Pillow imports all of its plugins, which takes 40 ms.
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageOps,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

# A declared size past this is refused before a pixel is decoded (a decompression bomb).
MAX_PIXELS = 100_000_000
# Pictures past this are reduced before they are converted, or each conversion is another copy.
_LARGE_PIXELS = 16_000_000
# Pictures past this are halved before faces are looked for in them.
_FULL_PIXELS = 50_000_000
# Named, for Pillow tries all that it knows: EPS would start Ghostscript, a program of its own.
_FORMATS: tuple[str, ...] = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
# How files begin that people take for photos, and that are not read.
_UNSUPPORTED = (
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "SVG or XML"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"%!PS", "PostScript"),
    (0, b"%PDF", "PDF"),
)


class InvalidImage(ValueError):
    """An image that cannot be decoded; the message is the reason, without the file's name."""


def decode_image(source: bytes | Path, size: int) -> np.ndarray:
    """Decode an image as the model sees it: upright, RGB, `size` x `size`.

    The orientation tag of EXIF is applied, transparency is laid over white, other colour modes
    become RGB, and the picture is resized with an antialiasing filter, without keeping its aspect
    ratio (as the study's generator did). Of animations and pages the first is taken. Training,
    prediction and serving all decode here.

    Args:
        source: the file's bytes, or its path.
        size: pixels a side.

    Returns:
        uint8 array of shape (size, size, 3).

    Raises:
        InvalidImage: the bytes are no image that can be decoded, or too large a one.
    """
    return measure_image(source, size)[0]


def measure_image(source: bytes | Path, size: int) -> tuple[np.ndarray, int, int]:
    """Decode an image as `decode_image` does, and return its own width and height, too.

    They may be those before it is turned upright: that depends on the format.

    Raises:
        InvalidImage: as `decode_image` does.
    """
    with _open(source) as image:
        width, height = image.size
        _draft(image, (2 * size, 2 * size))
        # EXIF is read before conversions, some of which drop it.
        ImageOps.exif_transpose(image, in_place=True)
        rgb = _to_rgb(_reduced(_to_8_bits(image), 4 * size))
        pixels = rgb.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(pixels), width, height


def decode_picture(source: bytes | Path) -> Image.Image:
    """Decode an image upright and in RGB, at its own size, as faces are looked for in it.

    A picture of more than 50 million pixels is halved, or it would take a gigabyte.

    Raises:
        InvalidImage: as `decode_image` does.
    """
    with _open(source) as image:
        if image.width * image.height > _FULL_PIXELS:
            _draft(image, (image.width // 2, image.height // 2))
        ImageOps.exif_transpose(image, in_place=True)
        upright = _to_8_bits(image)
        if upright.width * upright.height > _FULL_PIXELS:
            upright = _averaged(upright, 2)
        rgb = _to_rgb(upright)
        rgb.load()  # before the file is closed
        return rgb


@contextmanager
def _open(source: bytes | Path) -> Iterator[Image.Image]:
    """Open an image that is within the limits; whatever fails inside is an InvalidImage."""
    try:
        if isinstance(source, Path) and not stat.S_ISREG(source.stat().st_mode):
            # A pipe would be waited for, a device has no end.
            raise InvalidImage("not a plain file")
        file = source if isinstance(source, Path) else io.BytesIO(source)
        formats = _FORMATS
        if _start(source)[4:8] == b"ftyp":
            formats = ("HEIF", "AVIF")
            _register_heic_and_avif()
            _check_coded_size(source)
        with warnings.catch_warnings():
            # Pillow only warns between its limit and twice that; the check below is ours.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=formats)
        with image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InvalidImage(f"too large: {width}x{height} pixels")
            yield image
    except InvalidImage:
        raise
    except UnidentifiedImageError:
        raise InvalidImage(_unidentified(source)) from None
    except Image.DecompressionBombError:
        raise InvalidImage("too large: decompression bomb") from None
    except FileNotFoundError:
        raise InvalidImage("no such file") from None
    # Decoders of damaged files raise what they like; each means that this file cannot be read.
    except Exception as error:
        raise InvalidImage(f"cannot be decoded: {_reason(error)}") from error


def _draft(image: Image.Image, size: tuple[int, int]) -> None:
    """Let JPEG decode at a fraction of its size, never below `size`.

    HEIC would take its thumbnail, which may be of anything.
    """
    if image.format != "HEIF":
        image.draft("RGB", size)


def _start(source: bytes | Path) -> bytes:
    if isinstance(source, bytes):
        return source[:16]
    with source.open("rb") as file:
        return file.read(16)


@cache
def _register_heic_and_avif() -> None:
    """Register what decodes the photos of telephones, when one comes: it takes 0.1 s to import."""
    import pillow_heif
    from PIL import AvifImagePlugin  # noqa: F401

    pillow_heif.register_heif_opener()


def _check_coded_size(source: bytes | Path) -> None:
    """Refuse a HEIC or AVIF of too many pixels, even if it says to show only some of them."""
    content = source if isinstance(source, bytes) else source.read_bytes()
    for size in re.findall(rb"ispe\0{4}(.{8})", content, re.DOTALL):
        width, height = struct.unpack(">II", size)
        if width * height > MAX_PIXELS:
            raise InvalidImage(f"too large: {width}x{height} pixels")


def _unidentified(source: bytes | Path) -> str:
    start = _start(source)
    if not start:
        return "not an image: the file is empty"
    for offset, mark, name in _UNSUPPORTED:
        if start.startswith(mark, offset):
            return f"not an image in a known format: {name} is not supported, save it as JPEG"
    if start[4:8] == b"ftyp":
        return "not an image in a known format: a damaged HEIC or AVIF photo, or a film"
    return "not an image in a known format"


def _to_8_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow clips 16-bit greys at 255 instead of scaling them.
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image


def _reduced(image: Image.Image, least: int) -> Image.Image:
    """Return a large picture averaged to a fraction of its size, no side below `least`."""
    factor = min(image.size) // least
    if image.width * image.height <= _LARGE_PIXELS or factor < 2:
        return image
    return _averaged(image, factor)


def _averaged(image: Image.Image, factor: int) -> Image.Image:
    if image.mode in {"1", "P", "PA"}:
        # Numbers of colours have no average.
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image.reduce(factor)


def _to_rgb(image: Image.Image) -> Image.Image:
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
