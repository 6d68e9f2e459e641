import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from facegender.data import near_duplicates as duplicates
from facegender.data.fingerprints import Fingerprint, take_fingerprints
from facegender.data.image_files import find_images
from facegender.data.near_duplicates import find_near_duplicates, same_picture
from facegender.data.sources.sample import draw_sample


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def resized(image: Image.Image, factor: float) -> Image.Image:
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, Image.Resampling.BICUBIC)


def cropped(image: Image.Image, share: float) -> Image.Image:
    x, y = round(image.width * share), round(image.height * share)
    return image.crop((x, y, image.width - x, image.height - y))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as PNG": lambda image: image,
    "JPEG of quality 75": lambda image: jpeg(image, 75),
    "JPEG of quality 40": lambda image: jpeg(image, 40),
    "half the size": lambda image: resized(image, 0.5),
    "twice the size": lambda image: resized(image, 2),
    "brighter by a fifth": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "darker by a fifth": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "cropped by 2 % a side": lambda image: cropped(image, 0.02),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "all at once": lambda image: ImageEnhance.Brightness(
        jpeg(resized(cropped(image, 0.02), 0.7), 60)
    ).enhance(1.1),
}


@pytest.fixture(scope="module")
def cartoons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cartoons")
    draw_sample(folder, per_class=100, image_size=128, seed=42)
    return folder


def fingerprints(paths: list[Path]) -> list[Fingerprint]:
    taken = take_fingerprints(paths)
    assert [item for item in taken if isinstance(item, str)] == []
    return taken  # type: ignore[return-value]


def clusters(taken: list[Fingerprint]) -> list[list[int]]:
    return find_near_duplicates(
        np.stack([item.hashes for item in taken]), np.stack([item.thumbnail for item in taken])
    )


def copies_found(originals: list[Path], folder: Path, change: Callable) -> list[list[int]]:
    copies = [folder / f"{number:03}.png" for number in range(len(originals))]
    for original, copy in zip(originals, copies, strict=True):
        with Image.open(original) as image:
            change(image.convert("RGB")).save(copy)
    return clusters(fingerprints([*originals, *copies]))


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_a_cartoon_is_found_and_nothing_else(
    cartoons: Path, tmp_path: Path, name: str
) -> None:
    originals = [cartoons / path for path in find_images(cartoons)][::10]
    n = len(originals)
    found = copies_found(originals, tmp_path, COPIES[name])
    assert found == [[place, place + n] for place in range(n)]


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_a_portrait_is_found_and_nothing_else(
    shared: Path, tmp_path: Path, name: str
) -> None:
    originals = [shared / "faces" / path for path in find_images(shared / "faces")][::6]
    n = len(originals)
    found = copies_found(originals, tmp_path, COPIES[name])
    assert found == [[place, place + n] for place in range(n)]


def test_portraits_are_all_different(shared: Path) -> None:
    paths = [shared / "faces" / path for path in find_images(shared / "faces")]
    assert len(paths) == 120
    assert clusters(fingerprints(paths)) == []


def test_the_whole_sample_is_all_different(tmp_path: Path) -> None:
    draw_sample(tmp_path, per_class=600, image_size=128, seed=42)
    assert clusters(fingerprints([tmp_path / path for path in find_images(tmp_path)])) == []


def test_a_hash_alone_would_take_different_cartoons_for_copies(cartoons: Path) -> None:
    """What the alignment is for: without it this module would be a few lines."""
    taken = fingerprints([cartoons / path for path in find_images(cartoons)])
    hashes = np.stack([item.hashes for item in taken])
    pairs = [pair for some in duplicates._similar_hashes(hashes) for pair in some]
    assert len(pairs) > 5
    first, second = np.transpose(pairs)
    thumbnails = np.stack([item.thumbnail for item in taken])
    assert not same_picture(thumbnails[first], thumbnails[second]).any()


def test_chains_are_one_cluster_whatever_the_order(cartoons: Path, tmp_path: Path) -> None:
    path = cartoons / find_images(cartoons)[0]
    with Image.open(path) as image:
        for number in range(5):
            change = ImageEnhance.Brightness(image.convert("RGB")).enhance(1 - number / 20)
            change.save(tmp_path / f"{number}.png")
    paths = [*sorted(tmp_path.iterdir()), cartoons / find_images(cartoons)[1]]
    assert clusters(fingerprints(paths)) == [[0, 1, 2, 3, 4]]
    assert clusters(fingerprints(paths[::-1])) == [[1, 2, 3, 4, 5]]


def test_blocks_of_rows_give_what_all_pairs_give(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, (100, 5), dtype=np.uint64)
    hashes[40:60, :4] = hashes[:20, :4] ^ np.uint64(7)
    hashes[60:80, 4] = hashes[:20, 4] ^ np.uint64(7)
    hashes[80] = ~hashes[81]
    bits = np.unpackbits(hashes.view(np.uint8), axis=1).astype(int)
    differing = bits[:, None] != bits[None]
    near = differing[..., :256].sum(-1) <= duplicates.MAX_FINE_DISTANCE
    near |= differing[..., 256:].sum(-1) <= duplicates.MAX_COARSE_DISTANCE
    expected = {(i, j) for i, j in np.argwhere(near).tolist() if i < j}
    assert len(expected) == 40
    for rows in (1, 7, 32, 1000):
        monkeypatch.setattr(duplicates, "_HASH_ROWS", rows)
        assert {p for some in duplicates._similar_hashes(hashes) for p in some} == expected


def test_nothing_to_compare_is_no_duplicate() -> None:
    white = np.full((1, 32, 32, 3), 255, np.uint8)
    assert not same_picture(white, white).any()
