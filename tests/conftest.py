from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facegender.manifest import build_manifest
from facegender.params import Params, load_params
from facegender.preprocessing import write_part
from facegender.processed import Part
from tests.compose import ROOT


@pytest.fixture(scope="session")
def params() -> Params:
    return load_params(ROOT / "params.yaml")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The portraits and weights beside the repository, which are not part of it."""
    folder = ROOT.parent / "shared"
    if not (folder / "faces" / "faces.csv").is_file():
        pytest.skip("needs ../shared with its portraits and weights")
    return folder


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that fills a folder with small images that differ by class.

    Images of the second class are brighter, so that a model can learn them in a few steps.
    """

    def make(folder: str = "raw", per_class: int = 20, classes: tuple = ("female", "male")) -> Path:
        generator = np.random.default_rng(0)
        for place, name in enumerate(classes):
            directory = tmp_path / folder / name
            directory.mkdir(parents=True)
            for number in range(per_class):
                pixels = generator.integers(0, 128, (40, 40, 3)) + 127 * (place % 2)
                Image.fromarray(pixels.astype(np.uint8)).save(directory / f"{number:03}.png")
        return tmp_path / folder

    return make


@pytest.fixture
def part(make_images: Callable[..., Path], tmp_path: Path) -> Part:
    raw = make_images(per_class=20)
    manifest = build_manifest(raw, female=["female"], male=["male"], ignore=[])
    assert write_part(manifest, raw, tmp_path / "part", size=32, name="train", jobs=1) == []
    return Part(tmp_path / "part")
