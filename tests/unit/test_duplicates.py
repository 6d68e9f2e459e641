import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from facegender.data import alignment, similar_pictures
from facegender.data.fingerprints import take_fingerprints
from facegender.data.image_files import find_images
from facegender.data.near_duplicates import find_near_duplicates
from facegender.data.sources.sample import draw_sample
from facegender.errors import UserError
from facegender.files import file_sha256

Change = Callable[[Image.Image], Image.Image]


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def resized(image: Image.Image, factor: float) -> Image.Image:
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, Image.Resampling.BICUBIC)


def cropped(
    image: Image.Image, left: float, top: float, right: float, bottom: float
) -> Image.Image:
    width, height = image.size
    edges = (width * left, height * top, width * (1 - right), height * (1 - bottom))
    return image.crop(tuple(round(edge) for edge in edges))


def turned(image: Image.Image, degrees: float, fill: str = "black") -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill)


COPIES: dict[str, Change] = {
    "encoded again": lambda image: jpeg(image, 40),
    "half the size": lambda image: resized(image, 0.5),
    "brighter by a fifth": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "darker by a third": lambda image: ImageEnhance.Brightness(image).enhance(0.67),
    "mirrored": ImageOps.mirror,
    "grey": lambda image: image.convert("L"),
    "half as colourful": lambda image: ImageEnhance.Color(image).enhance(0.5),
    "turned by 5 degrees": lambda image: turned(image, 5),
    "turned back, on white": lambda image: turned(image, -5, "white"),
    "cropped by 10 % of each side": lambda image: cropped(image, 0.05, 0.05, 0.05, 0.05),
    "cropped by 10 % at each edge": lambda image: cropped(image, 0.1, 0.1, 0.1, 0.1),
    "cropped at a corner": lambda image: cropped(image, 0.1, 0.1, 0, 0),
    "all at once": lambda image: jpeg(
        resized(cropped(ImageOps.mirror(image.convert("L")), 0.05, 0.05, 0.05, 0.05), 0.7), 60
    ),
}


@pytest.fixture(scope="module")
def cartoons(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("cartoons")
    draw_sample(folder, per_class=60, image_size=128, seed=42)
    return [folder / path for path in find_images(folder)]


def thumbnails(pictures: list[Path], change: Change, folder: Path) -> np.ndarray:
    paths = [folder / f"{number:04}.png" for number in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        with Image.open(picture) as image:
            # Packed for speed: a PNG is the same pixels either way.
            change(image.convert("RGB")).save(path, compress_level=1)
    return take_fingerprints(paths)[2]


@cache  # each kind of copies is compared with the same originals
def thumbnails_of(originals: tuple[Path, ...]) -> np.ndarray:
    return take_fingerprints(originals)[2]


def check_copies(originals: list[Path], name: str, folder: Path, *, least: int) -> None:
    n = len(originals)
    both = np.concatenate(
        [thumbnails_of(tuple(originals)), thumbnails(originals, COPIES[name], folder)]
    )
    found = find_near_duplicates(both).groups
    assert [group for group in found if len(group) != 2 or group[1] != group[0] + n] == []
    assert len(found) >= least


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_cartoons_are_found_and_nothing_else(
    cartoons: list[Path], tmp_path: Path, name: str
) -> None:
    # A cartoon is bright: brightened more, half of it is white.
    least = 40 if name == "brighter by a fifth" else 55
    check_copies(cartoons[::2], name, tmp_path, least=least)


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("kind", ["faces", "photos"])
def test_copies_of_photos_are_found_and_nothing_else(
    shared: Path, tmp_path: Path, kind: str, name: str
) -> None:
    paths = [shared / kind / path for path in find_images(shared / kind)]
    check_copies(paths[:: len(paths) // 60][:60], name, tmp_path, least=57)


def test_different_pictures_stay_apart(shared: Path) -> None:
    """The 23 pairs among the photos were looked at: each is one picture."""
    counts = {}
    for kind in ("faces", "photos"):
        paths = [shared / kind / path for path in find_images(shared / kind)]
        found, crowded = find_near_duplicates(take_fingerprints(paths)[2])
        assert crowded == []
        counts[kind] = (len(paths), [len(group) for group in found])
    assert counts == {"faces": (120, []), "photos": (2307, [2] * 23)}


@pytest.mark.parametrize("brightness", [1, 0.1])
def test_different_cartoons_stay_apart_in_the_dark_too(
    cartoons: list[Path], tmp_path: Path, brightness: float
) -> None:
    def dark(image: Image.Image) -> Image.Image:
        return ImageEnhance.Brightness(image).enhance(brightness)

    assert find_near_duplicates(thumbnails(cartoons, dark, tmp_path)) == ([], [])


def scene(seed: int = 0) -> np.ndarray:
    """Soft shapes, as a thumbnail."""
    coarse = np.random.default_rng(seed).integers(30, 220, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC))


def same(one: np.ndarray, other: np.ndarray) -> bool:
    start = np.eye(2, dtype=np.float32)[None], np.zeros((1, 2), np.float32)
    verdicts = [
        bool(alignment.same_picture(first[None], second[None], *start)[0])
        for first, second in ((one, other), (other, one))
    ]
    assert verdicts[0] == verdicts[1]
    return verdicts[0]


def test_a_pair_is_judged_alike_alone_and_in_a_batch() -> None:
    soft = [scene(seed).astype(np.int16) for seed in range(8)]
    # Each second picture is cut off at white or at black; its neighbours are not, but differ.
    noise = np.random.default_rng(0).normal(0, 15, (32, 32, 1)).astype(np.int16)
    tones = [soft[i] + (noise, 70, noise, -90)[i % 4] for i in range(8)]
    moved = np.array(tones).clip(0, 255).astype(np.uint8)
    fixed = np.array(soft).astype(np.uint8)
    matrix = np.tile(np.eye(2, dtype=np.float32), (8, 1, 1))
    shift = np.zeros((8, 2), np.float32)
    batch = alignment.aligned_difference(moved, fixed, matrix, shift)
    alone = [
        alignment.aligned_difference(moved[[i]], fixed[[i]], matrix[[i]], shift[[i]])[:, 0]
        for i in range(8)
    ]
    assert np.isfinite(batch).all()
    np.testing.assert_allclose(batch.T, alone, rtol=1e-3)


def test_a_pair_is_aligned_before_it_is_judged() -> None:
    large = np.asarray(Image.fromarray(scene()).resize((36, 36), Image.Resampling.BICUBIC))
    assert same(large[:32, :32], large[2:34, 2:34])
    assert not same(large[:32, :32], large[4:, :32][:, ::-1])


def test_each_limit_keeps_different_pictures_apart() -> None:
    one = scene().astype(int)
    board = np.where((np.arange(32)[:, None] // 4 + np.arange(32) // 4) % 2, 12, -12)
    everywhere, corner = one + board[..., None], one.copy()
    corner[14:17, 14:17] += np.where(one[14:17, 14:17] < 128, 50, -50)
    start = np.eye(2, dtype=np.float32)[None], np.zeros((1, 2), np.float32)
    for other, over in ((everywhere, (True, False)), (corner, (False, True))):
        pair = one[None].astype(np.uint8), other[None].clip(0, 255).astype(np.uint8)
        rms, local = alignment.aligned_difference(*pair, *start)[:, 0]
        assert (rms > alignment.MAX_RMS, local > alignment.MAX_LOCAL) == over
        assert np.isfinite([rms, local]).all()
        assert not same(pair[0][0], pair[1][0])


def test_white_is_compared_with_what_is_not_white() -> None:
    """A cut-out face with long dark hair, and the same without."""
    face = np.full((32, 32, 3), 255, np.uint8)
    face[8:26, 10:22] = scene()[8:26, 10:22]
    hair = face.copy()
    hair[4:30, 6:10] = hair[4:30, 22:26] = hair[4:8, 6:26] = (40, 30, 30)
    assert same(face, face)
    assert not same(face, hair)


def test_colours_are_compared_unless_one_picture_is_grey() -> None:
    one = scene()
    grey = np.repeat(np.asarray(Image.fromarray(one).convert("L"))[..., None], 3, axis=2)
    assert same(one, grey)
    assert not same(one, one[..., ::-1])


def test_nothing_to_compare_is_no_duplicate() -> None:
    assert not same(*np.full((2, 32, 32, 3), 255, np.uint8))


@pytest.mark.parametrize(
    "sizes",
    [
        *({"_BLOCK": 7}, {"_TASK": 3}, {"_CELL": 8}, {"_CELL": 8, "_MANY": 1}),
        *({"MOST": 1}, {"_REFINED": 1, "_BLOCK": 3}),
    ],
)
def test_blocks_and_cells_change_nothing(
    cartoons: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]
) -> None:
    some = cartoons[:40]
    pictures = np.concatenate(
        [take_fingerprints(some)[2]]
        + [
            thumbnails(some, COPIES[name], tmp_path)
            for name in ("mirrored", "cropped at a corner", "half the size")
        ]
    )
    for name, value in sizes.items():
        monkeypatch.setattr(similar_pictures, name, value)
    expected = [[index, index + 40, index + 80, index + 120] for index in range(40)]
    assert find_near_duplicates(pictures).groups == expected


@pytest.mark.parametrize("limit", ["MOST", "_REFINED"])
def test_a_picture_that_resembles_more_than_are_compared_is_named(
    cartoons: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    few = [thumbnails(cartoons[:2], COPIES[name], tmp_path) for name in ("grey", "mirrored")]
    pictures = np.concatenate([take_fingerprints(cartoons[:9])[2], *few])
    groups = [[0, 9, 11], [1, 10, 12]]
    assert find_near_duplicates(pictures) == (groups, [])
    monkeypatch.setattr(similar_pictures, limit, 1)
    # What is linked is not compared again, so nothing is left out.
    assert find_near_duplicates(pictures) == (groups, [])
    for least in ("MIN_GREY", "MIN_COLOUR", "MIN_REFINED"):
        monkeypatch.setattr(similar_pictures, least, 0.2)
    assert find_near_duplicates(pictures) == (groups, list(range(13)))


def test_more_copies_than_are_compared_are_one_group(
    cartoons: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likeliest copies of a cartoon are those that are changed alike."""
    changes = [
        lambda image, by=quality, turn=turn: jpeg(turn(image), by)
        for turn in (Image.Image.copy, COPIES["turned by 5 degrees"])
        for quality in (95, 90, 85)
    ]
    pictures = np.concatenate(
        [thumbnails(cartoons[:1], change, tmp_path) for change in changes]
        + [take_fingerprints(cartoons[1:4])[2]]
    )
    monkeypatch.setattr(similar_pictures, "MOST", 2)
    assert find_near_duplicates(pictures) == ([[0, 1, 2, 3, 4, 5]], [])


def test_chains_are_one_group_whatever_the_order(cartoons: list[Path], tmp_path: Path) -> None:
    steps = [
        thumbnails(cartoons[:1], lambda image, by=radius: image.filter(by), tmp_path)
        for radius in map(ImageFilter.GaussianBlur, (0, 1, 2))
    ]
    pictures = np.concatenate([*steps, take_fingerprints(cartoons[1:2])[2]])
    assert find_near_duplicates(pictures).groups == [[0, 1, 2]]
    assert find_near_duplicates(pictures[::-1]).groups == [[1, 2, 3]]


def test_a_worker_that_sees_another_file_refuses_it(cartoons: list[Path]) -> None:
    digest = file_sha256(cartoons[0])
    assert take_fingerprints(cartoons[:1], [digest])[3] == {}
    with pytest.raises(UserError, match="another file is there"):
        take_fingerprints(cartoons[1:2], [digest])
