"""Pictures with intact pixels and damaged metadata."""

import hashlib
import io
import struct
from contextlib import suppress

from PIL import ExifTags, Image

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_EOI = b"\xff\xd9"
# Decoders ignore these bytes after the last pixel, and read them as pixels if some are missing.
_FILLER = b"\xa9\x5c\x37" * 700


def without_metadata(content: bytes) -> tuple[bytes, int] | None:
    """Strip a PNG or JPEG of everything that is not needed to show it.

    The bytes and checksums of the pixels do not change. A JPEG of one scan may lack its last bytes
    (FF D9), but no pixels.

    Returns:
        The shorter file and its EXIF orientation (1 if unreadable); None for other formats, and for
        files whose structure is damaged.
    """
    with suppress(struct.error, IndexError):
        if content.startswith(_PNG):
            return _shorter_png(content)
        if content.startswith(b"\xff\xd8\xff"):
            return _shorter_jpeg(content)
    return None


def _shorter_png(content: bytes) -> tuple[bytes, int]:
    kept, exif, position = [_PNG], b"", len(_PNG)
    while position < len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        if kind in _PNG_NEEDED:
            kept.append(content[position:end])
        elif kind == b"eXIf":
            exif = content[position + 8 : end - 4]
        position = end
    return b"".join(kept), read_orientation(exif)


def _shorter_jpeg(content: bytes) -> tuple[bytes, int] | None:
    kept, exif, position, progressive = [content[:2]], b"", 2, False
    while content[position + 1] != 0xDA:  # start of scan
        marker, length = struct.unpack_from(">xBH", content, position)
        segment = content[position : position + 2 + length]
        progressive |= marker == 0xC2
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
            exif = segment[10:]
        # Drop comments and applications' segments, except Adobe's, which defines the colours.
        if marker == 0xEE or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(segment)
        position += len(segment)
    shorter = b"".join([*kept, content[position:]]).removesuffix(b"\xff")
    if _EOI not in content[position:]:
        # A picture of several scans may lack whole scans unnoticed.
        if progressive or not _is_whole(shorter):
            return None
        shorter += _EOI
    return shorter, read_orientation(exif)


def _is_whole(jpeg: bytes) -> bool:
    """Return whether what follows the data changes no pixel: if some are missing, it does."""
    with suppress(OSError):
        return _pixels(jpeg + _EOI) == _pixels(jpeg + _FILLER + _EOI)
    return False


def _pixels(jpeg: bytes) -> bytes:
    with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
        return hashlib.sha256(image.tobytes()).digest()


def read_orientation(exif: bytes) -> int:
    """Return the EXIF orientation, or 1 if it is missing or unreadable."""
    tags = Image.Exif()
    # A damaged table of tags may raise anything; the picture is then not turned.
    with suppress(Exception):
        tags.load(exif)
        return int(tags.get(ExifTags.Base.Orientation, 1))
    return 1
