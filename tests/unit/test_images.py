from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facegender.data.images import decode_image, encode_png
from tests.bad_images import halves, save


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_quarter_turn_is_applied_in_every_format(form: str, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: the left half is on top
    pixels = decode_image(save(halves(mode), form, exif=exif, quality=95), 32)
    assert pixels[:12].max() < 20
    assert pixels[20:].min() > 235


def test_resizing_is_antialiased() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = decode_image(encode_png(stripes), 32)
    assert abs(pixels.astype(int) - 128).max() < 16


def test_a_path_and_its_bytes_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(save(halves(), "JPEG"))
    content = (tmp_path / "a.jpg").read_bytes()
    assert (decode_image(tmp_path / "a.jpg", 64) == decode_image(content, 64)).all()
