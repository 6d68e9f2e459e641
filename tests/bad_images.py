"""Images as people have them: those that decode, black on the left and white on the right, and
those that do not, with the reason that is promised."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from pillow_heif import register_heif_opener

from facegender.data.images import encode_png

register_heif_opener()


def save(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def halves(mode: str = "RGB") -> Image.Image:
    """Black on the left, white on the right."""
    image = Image.new("L", (80, 40))
    image.paste(255, (40, 0, 80, 40))
    return image.convert(mode)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def declared(width: int, height: int) -> bytes:
    """A PNG that declares a size and has hardly any pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def with_chunk(kind: bytes, content: bytes) -> bytes:
    png = save(halves(), "PNG")
    return png[:33] + chunk(kind, content) + png[33:]


def wrong_crc(kind: bytes) -> bytes:
    png = bytearray(save(halves(), "PNG"))
    start = png.index(kind)
    (length,) = struct.unpack(">I", png[start - 4 : start])
    png[start + 4 + length] ^= 0xFF
    return bytes(png)


def turned(orientation: int = 6, form: str = "JPEG", **tags: object) -> bytes:
    """A photo whose halves lie one above the other until it is turned as its EXIF says."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for number, value in tags.items():
        exif[int(number[1:], 16)] = value
    # Shown turned clockwise: what is below comes to the left.
    image = halves().transpose(Image.Transpose.ROTATE_90)
    return save(image, form, quality=95, exif=exif.tobytes())


def larger(content: bytes) -> bytes:
    """A HEIC or AVIF that declares 30,000 x 30,000 pixels."""
    start, *sizes = content.split(b"ispe\0\0\0\0")
    return start + b"".join(
        b"ispe\0\0\0\0" + struct.pack(">II", 30_000, 30_000) + rest[8:] for rest in sizes
    )


def broken_exif() -> bytes:
    """An orientation that is kept, and a pointer that leads out of the file."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 1) + struct.pack("<HHII", 0x8769, 4, 1, 0xFFFFFFF0)
    return save(halves(), "JPEG", quality=95, exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries)


def odd_resolution(form: str = "JPEG") -> bytes:
    """A photo to be turned, whose XResolution is a text."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x011A, 2, 4, b"72")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + bytes(4)
    return save(halves().transpose(Image.Transpose.ROTATE_90), form, quality=95, exif=exif)


def palette_with_alpha() -> bytes:
    """Black, and a colour that is all transparent."""
    image = halves("L").point(lambda level: level // 255).convert("P")
    image.putpalette([0, 0, 0, 200, 0, 0])
    return save(image, "PNG", transparency=1)


def half_transparent() -> bytes:
    image = halves("RGBA")
    pixels = np.asarray(image).copy()
    pixels[:, 40:] = (200, 0, 0, 0)
    return save(Image.fromarray(pixels), "PNG")


def transparent_grey16() -> bytes:
    """Black, and a level that is all transparent, in a PNG of 16 bits."""
    levels = np.asarray(halves("L"), dtype=np.uint16) // 2
    png = save(Image.fromarray(levels), "PNG")
    return png[:33] + chunk(b"tRNS", struct.pack(">H", 127)) + png[33:]


def tiff(levels: np.ndarray, bits: int, sample: int = 1, white: int = 1, most: int = 0) -> bytes:
    """A grey TIFF: sample 1 is unsigned, 2 signed, 3 floating point; white 0 means it is zero."""
    content = levels.tobytes()
    height, width = levels.shape
    # Samples of 12 bits are packed: the width of their array is in bytes.
    width = width * levels.itemsize * 8 // bits
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, white)]
    tags += [(273, 4, 0), (277, 3, 1), (278, 4, height), (279, 4, len(content))]
    tags += [(281, 3, most)] * bool(most) + [(339, 3, sample)]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, kind, 1, start if tag == 273 else value)
        for tag, kind, value in tags
    )
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    return head + entries + bytes(4) + content


_HALVES = np.asarray(halves("L"))
_INVERTED = Image.fromarray(255 - np.asarray(halves()))
_GREY16 = Image.fromarray(np.asarray(halves("L"), dtype=np.uint16) * 257)
_JPEG = save(halves(), "JPEG", quality=95)
_HEIC = save(halves(), "HEIF", quality=95)
_AVIF = save(halves(), "AVIF", quality=95)
_BOMB = zlib.compress(bytes(100_000_000))

GOOD: dict[str, bytes] = {
    "jpeg": _JPEG,
    "progressive-jpeg": save(halves(), "JPEG", quality=95, progressive=True),
    "grey": save(halves("L"), "PNG"),
    "grey-jpeg": save(halves("L"), "JPEG", quality=95),
    "bilevel": save(halves("1"), "PNG"),
    "cmyk": save(halves("CMYK"), "JPEG", quality=95),
    "grey16": save(_GREY16, "PNG"),
    "grey16-tiff": save(_GREY16, "TIFF"),
    "grey16-white-is-zero": tiff(~(_HALVES.astype("<u2") * 257), 16, white=0),
    "grey16-transparent": transparent_grey16(),
    "grey12": tiff(np.repeat(_HALVES, 3, axis=1)[:, ::2], 12),
    "grey12-in-16": tiff(_HALVES.astype("<u2") * 16 + _HALVES // 16, 16, most=4095),
    "grey32": tiff(_HALVES.astype("<i4"), 32, sample=2),
    "grey-float": tiff(_HALVES.astype("<f4") / 255, 32, sample=3),
    "grey-with-alpha": save(halves("LA"), "PNG"),
    "palette-with-alpha": palette_with_alpha(),
    "transparent": half_transparent(),
    "exif-turned": turned(),
    "png-turned": turned(form="PNG"),
    "tiff-turned": turned(form="TIFF"),
    "webp-turned": turned(form="WEBP"),
    "huge-exif": turned(_0x010F="x" * 60_000),
    "broken-exif": broken_exif(),
    "animated-gif": save(halves(), "GIF", save_all=True, append_images=[_INVERTED] * 3),
    "animated-webp": save(
        halves(), "WEBP", lossless=True, save_all=True, append_images=[_INVERTED] * 3
    ),
    "multi-page-tiff": save(halves(), "TIFF", save_all=True, append_images=[_INVERTED]),
    "mpo": save(halves(), "MPO", quality=95, save_all=True, append_images=[_INVERTED]),
    # A telephone's Ultra HDR: behind the picture lies a map of how bright it may shine.
    "ultra-hdr": _JPEG + save(_INVERTED.resize((20, 10)), "JPEG"),
    "heic": _HEIC,
    "heic-turned": turned(form="HEIF"),
    "heic-of-two": save(halves(), "HEIF", quality=95, save_all=True, append_images=[_INVERTED]),
    "avif": _AVIF,
    "avif-turned": turned(form="AVIF"),
    "trailing-garbage": _JPEG + b"\xff\xd8 more" * 1000,
    "wrong-crc-of-pixels": wrong_crc(b"IDAT"),
    "cmyk-tiff": save(halves("CMYK"), "TIFF"),
    "wrong-crc-of-text": with_chunk(b"tEXt", b"Comment\0hi").replace(b"\0hi", b"\0ho"),
    "nonsense-exif-png": with_chunk(b"eXIf", b"nonsense"),
    "short-phys": with_chunk(b"pHYs", b"\0\0"),
    "text-as-resolution": odd_resolution(),
    "text-as-resolution-webp": odd_resolution("WEBP"),
    "nonsense-exif-webp": save(halves(), "WEBP", quality=95, exif=b"nonsense"),
    "nonsense-exif-heic": save(halves(), "HEIF", quality=95, exif=b"nonsense"),
    "jpeg-without-its-end": _JPEG[:-2],
    "jpeg-without-its-last-byte": _JPEG[:-1],
    "interlaced-bmp-16-million": save(halves(), "BMP"),
}

BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "text": (b"To whom it may concern", "not an image in a known format"),
    "zeros": (bytes(5000), "not an image in a known format"),
    "html": (b"<!DOCTYPE html><html>404</html>", "not an image in a known format"),
    "truncated-jpeg": (_JPEG[:400], "cannot be decoded"),
    "truncated-png": (save(halves(), "PNG")[:-40], "cannot be decoded"),
    "truncated-gif": (save(halves(), "GIF")[:-30], "cannot be decoded"),
    "truncated-webp": (save(halves(), "WEBP")[:-30], "cannot be decoded"),
    "truncated-tiff": (save(halves(), "TIFF")[:-3000], "cannot be decoded"),
    "truncated-bmp": (save(halves(), "BMP")[:-300], "cannot be decoded"),
    "header-only": (_JPEG[:20], "not an image in a known format|cannot be decoded"),
    "wrong-crc-of-header": (wrong_crc(b"IHDR"), "not an image in a known format"),
    "bomb": (declared(30_000, 30_000), "too large"),
    "bomb-within-pillows-limit": (declared(11_000, 10_000), "too large: 11000x10000"),
    "no-pixels": (declared(0, 10), "cannot be decoded|not an image"),
    "text-bomb": (with_chunk(b"zTXt", b"a\0\0" + _BOMB), "cannot be decoded"),
    "profile-bomb": (with_chunk(b"iCCP", b"a\0\0" + _BOMB), "cannot be decoded"),
    "grey32-without-white": (tiff(_HALVES.astype("<u4") * 16843009, 32), "no known white"),
    "svg": (
        b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "SVG is not supported",
    ),
    "xml": (b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "aa">]><svg/>', "not supported"),
    "ico": (save(halves(), "ICO"), "ICO is not supported"),
    "postscript": (save(halves(), "EPS"), "PostScript is not supported"),
    "pdf": (b"%PDF-1.7\n", "PDF is not supported"),
    "no-heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "a damaged HEIC or AVIF"),
    "no-avif": (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(200), "a damaged HEIC or AVIF"),
    "film": (b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(200), "or a film"),
    "truncated-heic": (_HEIC[:-100], "damaged HEIC|cannot be decoded"),
    "truncated-avif": (_AVIF[:-100], "damaged HEIC|cannot be decoded"),
    "heic-bomb": (larger(_HEIC), "too large: 30000x30000"),
    "avif-bomb": (larger(_AVIF), "too large: 30000x30000"),
}


def write_jpgs(folder: Path, images: dict[str, bytes]) -> list[Path]:
    """Write images as .jpg, which most of them are not, and return their paths, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.jpg" for name in images]
    for path, content in zip(paths, images.values(), strict=True):
        path.write_bytes(content)
    return paths


def plain(count: int) -> list[bytes]:
    """Different noises as PNG."""
    generator = np.random.default_rng(0)
    return [
        encode_png(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(count)
    ]
