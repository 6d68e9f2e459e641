from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facegender.data.images import InvalidImage, decode_image, encode_png
from tests.bad_images import halves, save


@pytest.mark.parametrize(
    "content",
    [
        save(halves(), "PNG"),
        save(halves(), "JPEG", quality=95),
        save(halves("L"), "PNG"),
        save(halves("1"), "PNG"),
        save(halves("P"), "GIF"),
        save(halves("CMYK"), "JPEG", quality=95),
        save(halves(), "WEBP", lossless=True),
        save(halves(), "BMP"),
        save(halves(), "TIFF"),
        save(Image.fromarray(np.asarray(halves("L"), dtype=np.uint16) * 257), "PNG"),
        save(halves("RGBA"), "PNG"),
    ],
    ids=[
        "png",
        "jpeg",
        "grey",
        "bilevel",
        "palette",
        "cmyk",
        "webp",
        "bmp",
        "tiff",
        "grey16",
        "rgba",
    ],
)
def test_every_mode_becomes_rgb_of_the_size_asked_for(content: bytes) -> None:
    pixels = decode_image(content, 32)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert pixels[:, :12].max() < 20
    assert pixels[:, 20:].min() > 235


def test_the_orientation_tag_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down: the white half is on the left when shown
    pixels = decode_image(save(halves(), "JPEG", exif=exif, quality=95), 32)
    assert pixels[:, :12].min() > 235


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_quarter_turn_is_applied_in_every_format(form: str, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: the left half is on top
    pixels = decode_image(save(halves(mode), form, exif=exif, quality=95), 32)
    assert pixels[:12].max() < 20
    assert pixels[20:].min() > 235


def test_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    assert decode_image(save(image, "PNG"), 32).min() == 255


def test_resizing_is_antialiased() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = decode_image(encode_png(stripes), 32)
    assert abs(pixels.astype(int) - 128).max() < 16


def test_a_path_and_its_bytes_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(save(halves(), "JPEG"))
    content = (tmp_path / "a.jpg").read_bytes()
    assert (decode_image(tmp_path / "a.jpg", 64) == decode_image(content, 64)).all()


def bomb() -> bytes:
    """A PNG that declares 30,000 x 30,000 pixels."""
    content = bytearray(save(halves(), "PNG"))
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image"),
        (b"not an image at all", "not an image"),
        (save(halves(), "JPEG")[:400], "cannot be decoded"),
        (save(halves(), "PNG")[:-40], "cannot be decoded"),
        (bomb(), "too large"),
    ],
    ids=["empty", "text", "truncated-jpeg", "truncated-png", "bomb"],
)
def test_a_bad_image_has_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(InvalidImage, match=reason):
        decode_image(content, 32)


def test_a_missing_file_has_a_reason_without_its_path(tmp_path: Path) -> None:
    with pytest.raises(InvalidImage) as caught:
        decode_image(tmp_path / "absent.jpg", 32)
    assert str(tmp_path) not in str(caught.value)
