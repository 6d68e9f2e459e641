"""Decodes the bytes of any image file to the uint8 RGB array that the model takes."""

import errno
import io
import re
import stat
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import (
    # Registered on import. Otherwise Pillow imports all of its plugins, which takes 40 ms.
    BmpImagePlugin,  # noqa: F401
    ExifTags,
    GifImagePlugin,  # noqa: F401
    Image,
    ImageOps,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from facegender.data.damaged_metadata import read_orientation, without_metadata
from facegender.errors import UserError

_T = TypeVar("_T")
_MAX_SAMPLE_VALUE = 281  # tag of a TIFF
# A larger declared size is refused before a pixel is decoded (a decompression bomb).
MAX_PIXELS = 100_000_000
# A file is read whole before it is decoded; the largest picture takes 400 MB uncompressed.
MAX_BYTES = 1 << 29
# Seconds between attempts to read or decode a file when the disk or the memory fails.
_PAUSES = (0.1, 1.0, 3.0)
# Larger pictures are reduced before they are converted, because each conversion makes a copy.
_LARGE_PIXELS = 16_000_000
# Larger pictures are halved before faces are looked for in them.
_FULL_PIXELS = 50_000_000
# Named, because Pillow would try all formats that it knows, and EPS starts Ghostscript.
_FORMATS: tuple[str, ...] = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
# Offset and first bytes of unsupported files that people may take for photos.
_UNSUPPORTED = (
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "SVG or XML"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"%!PS", "PostScript"),
    (0, b"%PDF", "PDF"),
)


class InvalidImage(ValueError):
    """An image that cannot be decoded; the message is the reason, without the file's name."""


class UnreadableImage(InvalidImage):
    """A file that could not be read whole, or decoded for lack of memory: it may be intact."""


def verdict(error: InvalidImage, path: Path) -> str:
    """Return why a file is not an image.

    Raises:
        UserError: the file could not be read or memory ran out, so the image may be intact.
    """
    if isinstance(error, UnreadableImage):
        raise UserError(
            f"{str(path)!r} cannot be read: {error}. This says nothing about the image: check the "
            "disk or network and the free memory, and run the same command again."
        ) from error
    return str(error)


def decode_image(source: bytes | Path, size: int) -> np.ndarray:
    """Decode an image as the model sees it: upright, RGB, `size` x `size`.

    The EXIF orientation is applied, transparent parts become white, other colour modes become RGB,
    and the picture is resized with an antialiasing filter, without keeping its aspect ratio (as the
    study's generator did). Of animations and pages the first is taken. Training, prediction and
    serving all decode here.

    Args:
        source: the file's bytes, or its path.
        size: pixels a side.

    Returns:
        uint8 array of shape (size, size, 3).

    Raises:
        InvalidImage: the image is too large or cannot be decoded.
        UnreadableImage: the file could not be read whole, or memory ran out, several times.
    """
    return measure_image(source, size)[0]


def measure_image(source: bytes | Path, size: int) -> tuple[np.ndarray, int, int]:
    """Decode an image as `decode_image` does, and also return its own width and height.

    Depending on the format, they are those before the image is turned upright.

    Raises:
        InvalidImage: as `decode_image` does.
    """

    def measure(image: Image.Image) -> tuple[np.ndarray, int, int]:
        width, height = image.size
        _draft(image, (2 * size, 2 * size))
        # EXIF is read before conversions, some of which drop it.
        ImageOps.exif_transpose(image, in_place=True)
        rgb = _to_rgb(_reduced(_to_8_bits(image), 4 * size))
        pixels = rgb.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(pixels), width, height

    return _decode(source, measure)


def decode_picture(source: bytes | Path) -> tuple[Image.Image, float]:
    """Decode an image upright and in RGB, to find faces in it.

    Returns:
        The picture, and its width divided by that of the upright image: 1, or about a half for more
        than 50 million pixels, which would take a gigabyte.

    Raises:
        InvalidImage: as `decode_image` does.
    """

    def upright(image: Image.Image) -> tuple[Image.Image, float]:
        longer = max(image.size)  # the same before and after it is turned
        if image.width * image.height > _FULL_PIXELS:
            _draft(image, (image.width // 2, image.height // 2))
        ImageOps.exif_transpose(image, in_place=True)
        picture = _to_8_bits(image)
        if picture.width * picture.height > _FULL_PIXELS:
            picture = _averaged(picture, 2)
        rgb = _to_rgb(picture)
        rgb.load()  # before the file is closed
        return rgb, max(rgb.size) / longer

    return _decode(source, upright)


def _decode(source: bytes | Path, use: Callable[[Image.Image], _T]) -> _T:
    """Call `use` with the open image, and try again while memory is short."""
    content = _read(source) if isinstance(source, Path) else source
    for pause in (*_PAUSES, None):
        try:
            return _use(content, use)
        except MemoryError:
            if pause is None:
                raise UnreadableImage("not enough memory") from None
            time.sleep(pause)
    raise AssertionError


def _read(path: Path) -> bytes:
    """Return the bytes of a file, all of them."""
    for pause in (*_PAUSES, None):
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                # A pipe would block, and a device has no end.
                raise InvalidImage("not a plain file")
            if status.st_size > MAX_BYTES:
                raise InvalidImage(f"too large: {status.st_size:,} bytes")
            content = path.read_bytes()
            if len(content) >= status.st_size:
                return content
            reason = f"{len(content):,} of its {status.st_size:,} bytes can be read"
        except FileNotFoundError:
            raise UnreadableImage("no such file") from None
        except MemoryError:
            reason = "not enough memory"
        except OSError as error:
            reason = error.strerror or type(error).__name__
            # These do not pass.
            if error.errno in {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR}:
                raise UnreadableImage(reason) from error
        if pause is not None:
            time.sleep(pause)
    raise UnreadableImage(reason)


def _use(content: bytes, use: Callable[[Image.Image], _T]) -> _T:
    try:
        with _open(content) as image:
            return use(image)
    except InvalidImage as error:
        # Oversized metadata are refused, not stripped.
        if "too large" in str(error):
            raise
        shorter, orientation = without_metadata(content) or (content, 1)
        try:
            with _open(shorter) as image:
                if exif := image.info.pop("exif", b""):  # of a WebP or HEIC, which is not stripped
                    orientation = read_orientation(exif)
                if orientation != 1:
                    image.getexif()[ExifTags.Base.Orientation] = orientation
                return use(image)
        except InvalidImage:
            raise error from None


@contextmanager
def _open(content: bytes) -> Iterator[Image.Image]:
    """Open an image that is within the limits; any failure inside becomes an InvalidImage."""
    try:
        formats = _FORMATS
        if content[4:8] == b"ftyp":
            formats = ("HEIF", "AVIF")
            _register_heic_and_avif()
            _check_coded_size(content)
        with warnings.catch_warnings():
            # Between its limit and twice that, Pillow only warns; our own check is below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=formats)
        with image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InvalidImage(f"too large: {width}x{height} pixels")
            yield image
    except (InvalidImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise InvalidImage(_unidentified(content)) from None
    except Image.DecompressionBombError:
        raise InvalidImage("too large: decompression bomb") from None
    # Decoders may raise anything at a damaged file.
    except Exception as error:
        raise InvalidImage(f"cannot be decoded: {_reason(error)}") from error


def _draft(image: Image.Image, size: tuple[int, int]) -> None:
    """Let JPEG decode at a fraction of its size, never below `size`.

    Not HEIC, which would take its thumbnail, and that may show anything.
    """
    if image.format != "HEIF":
        image.draft("RGB", size)


@cache
def _register_heic_and_avif() -> None:
    """Register the decoders of phones' photos when the first one comes: the import takes 0.1 s."""
    import pillow_heif
    from PIL import AvifImagePlugin  # noqa: F401

    pillow_heif.register_heif_opener()


def _check_coded_size(content: bytes) -> None:
    """Refuse a HEIC or AVIF of too many pixels, even if it declares that only some are shown."""
    for size in re.findall(rb"ispe\0{4}(.{8})", content, re.DOTALL):
        width, height = struct.unpack(">II", size)
        if width * height > MAX_PIXELS:
            raise InvalidImage(f"too large: {width}x{height} pixels")


def _unidentified(content: bytes) -> str:
    start = content[:16]
    if not start:
        return "not an image: the file is empty"
    for offset, mark, name in _UNSUPPORTED:
        if start.startswith(mark, offset):
            return f"not an image in a known format: {name} is not supported, save it as JPEG"
    if start[4:8] == b"ftyp":
        return "not an image in a known format: a damaged HEIC or AVIF photo, or a film"
    return "not an image in a known format"


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale greys of more than 8 bits to 8, because Pillow clips them at 255."""
    if image.mode not in {"F", "I"} and not image.mode.startswith("I;16"):
        return image
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    transparent = image.info.get("transparency")
    bits = _bits(image, tags)
    if image.mode == "F":
        scale = 255 / (2**bits - 1)
        grey = image.point(lambda level: level * scale + 0.5).convert("L")
    else:
        levels = np.asarray(image) >> (bits - 8)
        grey = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
        grey = ImageOps.invert(grey)
    if isinstance(transparent, int):
        alpha = np.where(np.asarray(image) == transparent, np.uint8(0), np.uint8(255))
        return Image.merge("LA", (grey, Image.fromarray(alpha)))
    return grey


def _bits(image: Image.Image, tags: Mapping[int, Any]) -> int:
    """Return the number of bits of white in a grey picture of more than 8 bits.

    A TIFF of 12 bits declares them, or its largest sample. Samples of a PNG use all bits. Those of
    32 bits or floating point hold what a program had in memory: levels of 8 or 16 bits, or from 0
    to 1.
    """
    stored, largest = (
        int(np.ravel(tags.get(tag, default))[0])
        for tag, default in ((TiffImagePlugin.BITSPERSAMPLE, 16), (_MAX_SAMPLE_VALUE, 0))
    )
    darkest, brightest = (float(np.ravel(level)[0]) for level in image.getextrema())
    if stored <= 16:
        declared = largest.bit_length()
        plausible = 8 < declared < 16 and largest == 2**declared - 1 and brightest <= largest
        return declared if plausible else stored
    for bits in (1, 8, 16) if image.mode == "F" else (8, 16):
        if darkest >= 0 and brightest <= 2**bits - 1:
            return bits
    raise InvalidImage(
        f"has levels from {darkest:g} to {brightest:g}, and no known white: save it as PNG"
    )


def _reduced(image: Image.Image, least: int) -> Image.Image:
    """Average a large picture to a fraction of its size, with no side below `least`."""
    factor = min(image.size) // least
    if image.width * image.height <= _LARGE_PIXELS or factor < 2:
        return image
    return _averaged(image, factor)


def _averaged(image: Image.Image, factor: int) -> Image.Image:
    if image.mode in {"1", "P", "PA"}:
        # Indices of colours have no average.
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image.reduce(factor)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    # `convert` would copy an RGB picture, too.
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    # The message of an OSError can name the file, and reasons must not depend on its path.
    return (error.strerror if isinstance(error, OSError) else None) or (
        str(error).splitlines()[0] if str(error) else type(error).__name__
    )


def encode_png(pixels: np.ndarray) -> bytes:
    """Return an image, uint8 of shape (height, width, 3), as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
