"""A folder with everything bad in it, through the real stages, run by DVC."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image, ImageEnhance

from facegender.data.processed import ProcessedSplit
from tests.bad_images import BAD, GOOD, write_jpgs
from tests.pipeline.conftest import SMALL, Clone

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(make_images: Callable[..., Path], tmp_path: Path) -> Path:
    """Forty good images, and among them what people have."""
    folder = make_images("faces", per_class=20)
    bad = {name: content for name, (content, _) in BAD.items()}
    write_jpgs(folder / "male" / "bad", bad)
    write_jpgs(folder / "female" / "odd", {name: GOOD[name] for name in ("cmyk", "animated-gif")})
    (folder / "female" / "new\nline é.PNG").write_bytes(
        (folder / "female" / "000.png").read_bytes()
    )
    (folder / "female" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(GOOD["exif-turned"])
    with Image.open(folder / "male" / "001.png") as image:
        ImageEnhance.Brightness(image).enhance(0.9).resize((80, 80)).save(
            folder / "female" / "other-label.png"
        )
    Image.new("RGB", (1, 1)).save(folder / "male" / "dot.png")
    (tmp_path / "outside.jpg").write_bytes(GOOD["jpeg"])
    (folder / "male" / "outside.jpg").symlink_to(tmp_path / "outside.jpg")
    (folder / "male" / "itself.jpg").symlink_to("itself.jpg")
    (folder / "male" / "circle").symlink_to(folder)
    os.mkfifo(folder / "male" / "pipe.jpg")
    for name in (".DS_Store", "Thumbs.db", "__MACOSX/._1.jpg", "logo.svg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"litter")
    return folder


@pytest.mark.timeout(600)
def test_dvc_neither_waits_nor_stops_at_what_is_in_a_folder_and_sees_its_changes(
    new_clone: Callable[..., Clone], folder: Path
) -> None:
    (folder / "nowhere.jpg").symlink_to("missing.jpg")
    (folder / ".dvcignore").write_text("*.png")
    clone = new_clone()

    def ran(*command: str) -> list[str]:
        return clone.ran(clone.run("dvc", *command, "download", HOME=str(folder.parent)).stdout)

    new = ("-S", "dataset=folder", "-S", f"dataset.path='~/{folder.name}'")
    assert ran("exp", "run", *new) == ["list@folder", "download"]
    copied = clone.root / "data/raw/female"
    assert {"000.png", r"caf\xe9.jpg"} <= {path.name for path in copied.iterdir()}
    assert {"nowhere.jpg", "male/pipe.jpg", "male/itself.jpg"} <= json.loads(
        (clone.root / "data/raw.json").read_text()
    )["left_out"].keys()
    assert ran("repro") == ["list@folder"]
    (folder / "female/000.png").write_bytes(GOOD["jpeg"])
    assert ran("repro") == ["list@folder", "download"]
    assert (copied / "000.png").read_bytes() == GOOD["jpeg"]
    clone.compose()
    assert ran("repro") == ["download"]


@pytest.mark.timeout(600)
def test_each_is_used_or_named_and_no_stage_stops(
    new_clone: Callable[..., Clone], folder: Path
) -> None:
    clone = new_clone()
    clone.compose(
        *SMALL[2:],
        "dataset=folder",
        f"dataset.path={folder}",
        "data.max_invalid_fraction=0.5",
        "data.max_dropped_fraction=0.5",
    )
    done = clone.run("dvc", "repro", "preprocess")
    assert clone.ran(done.stdout) == ["list@folder", "download", "split", "preprocess"]
    raw = json.loads((clone.root / "data/raw.json").read_text())
    assert sorted(raw["left_out"]) == [
        f"male/{name}" for name in ("circle", "itself.jpg", "outside.jpg", "pipe.jpg")
    ]
    data = json.loads((clone.root / "metrics/data.json").read_text())
    assert {item["path"] for item in data["invalid"]["images"]} == {
        f"male/bad/{name}.jpg" for name in BAD
    }
    assert all(item["reason"] for item in data["invalid"]["images"])
    counts = {name: found["count"] for name, found in data["checks"].items()}
    assert counts == {
        "too_small": 1,
        "extreme_shape": 0,
        "constant": 0,
        "both_labels": 2,
        "leakage": 0,
        "exact_duplicates": 1,
        # Three show the same, but in black and white alone: all is clipped, nothing is compared.
        "near_duplicates": 0,
    }
    assert data["under_both_labels"] == ["female/other-label.png", "male/001.png"]
    dropped = pd.read_csv(clone.root / "data/splits/dropped.csv", lineterminator="\n")
    assert len(dropped) == len(BAD) + 4
    parts = [
        ProcessedSplit(clone.root / "data/processed" / name)
        for name in ("train", "validation", "test")
    ]
    used = {path for part in parts for path in part.index["path"]}
    # The forty, less one under both labels, and the three of the same kind.
    assert len(used) == 42
    for name in ("exact_duplicates", "both_labels", "too_small", "Left out"):
        assert name in done.stderr
    assert "Traceback" not in done.stderr
