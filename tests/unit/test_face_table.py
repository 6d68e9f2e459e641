"""The data's faces: found once, kept in a table, cut out as every front cuts them out."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from facegender.data.checks import Findings, check_faces
from facegender.data.face_images import face_images
from facegender.data.face_table import find_all_faces, missed_by_group, read_faces
from facegender.data.images import decode_picture
from facegender.data.manifest import write_table
from facegender.data.preprocessing import write_split
from facegender.data.processed import ProcessedSplit
from facegender.errors import UserError
from facegender.faces.crop import find_faces
from facegender.faces.settings import FaceCrop
from tests.unit.conftest import two_faces

CROP = FaceCrop(margin=0.25, align=True, min_score=0.75, min_size=24)
# Of no, one and three faces.
COUNTS = pd.DataFrame({"path": ["a", "b", "c"], "faces": [0, 1, 3]})


@pytest.fixture
def raw(shared: Path, tmp_path: Path) -> Path:
    """A portrait, the same among others, and none."""
    folder = tmp_path / "raw"
    folder.mkdir()
    with Image.open(shared / "faces" / "male" / "03.jpg") as picture:
        portrait = picture.convert("RGB")
    portrait.save(folder / "NA.png")
    two_faces(portrait).save(folder / "b.png")
    Image.new("RGB", (300, 200), (120, 130, 110)).save(folder / "c.png")
    return folder


def test_preprocess_cuts_out_what_predict_cuts_out(raw: Path, tmp_path: Path) -> None:
    names = ["NA.png", "b.png", "c.png"]
    manifest = pd.DataFrame({"path": names, "label": [1, 1, 0], "sha256": names})
    table = find_all_faces(manifest, raw, CROP, jobs=1)
    assert list(table["faces"]) == [1, 2, 0]
    write_table(table, tmp_path / "faces.csv")
    faces = read_faces(tmp_path / "faces.csv")
    options = {"size": 48, "name": "train", "jobs": 1, "crop": CROP, "faces": faces}
    assert write_split(manifest, raw, tmp_path / "part", **options) == []
    written = np.load(tmp_path / "part" / "images.npy")
    for name, pixels in zip(names, written, strict=True):
        face, expected = face_images(raw / name, 48, CROP)[0]
        assert faces[name] == face
        np.testing.assert_array_equal(pixels, expected)


def test_several_processes_make_the_bytes_of_one(raw: Path, tmp_path: Path) -> None:
    # More images than a task has.
    names = ["NA.png", "b.png", "c.png"] * 22
    manifest = pd.DataFrame({"path": names, "label": 1, "sha256": ""})
    made = {}
    for jobs in (1, 2):
        table = find_all_faces(manifest.iloc[:18], raw, CROP, jobs=jobs)
        write_table(table, tmp_path / f"{jobs}.csv")
        options = {"size": 24, "name": "train", "jobs": jobs, "crop": CROP}
        faces = read_faces(tmp_path / f"{jobs}.csv")
        write_split(manifest, raw, tmp_path / f"{jobs}", faces=faces, **options)
        files = (tmp_path / f"{jobs}.csv", tmp_path / f"{jobs}" / "images.npy")
        made[jobs] = [file.read_bytes() for file in files]
    assert made[1] == made[2]


def test_a_border_adds_a_second_array_and_changes_no_byte_of_the_first(
    raw: Path, tmp_path: Path
) -> None:
    names = ["NA.png", "b.png", "c.png"]
    manifest = pd.DataFrame({"path": names, "label": [1, 1, 0], "sha256": names})
    faces = {name: (find_faces(decode_picture(raw / name)[0], CROP) or [None])[0] for name in names}
    options = {"size": 48, "name": "train", "jobs": 1, "crop": CROP, "faces": faces}
    for name, border in (("tight", 0), ("wide", 5)):
        assert write_split(manifest, raw, tmp_path / name, border=border, **options) == []
    assert [path.name for path in sorted((tmp_path / "tight").iterdir())] == [
        "images.npy",
        "index.csv",
    ]
    tight, wide = ProcessedSplit(tmp_path / "tight"), ProcessedSplit(tmp_path / "wide")
    assert tight.wide is None
    for name in ("images.npy", "index.csv"):
        assert (tmp_path / "tight" / name).read_bytes() == (tmp_path / "wide" / name).read_bytes()
    surrounded = wide.wide.read(np.arange(3))
    assert surrounded.shape == (3, 58, 58, 3)
    # At the edges the filter sees more of the picture.
    difference = surrounded[:, 5:-5, 5:-5].astype(int) - tight.images
    assert np.abs(difference).mean() < 0.1
    assert [path.name for path in wide.files] == ["images.npy", "index.csv", "wide.npy"]


@pytest.mark.parametrize(
    ("no_face", "several", "kept"),
    [
        ("keep", "keep", "abc"),
        ("drop", "keep", "bc"),
        ("keep", "drop", "ab"),
        ("drop", "drop", "b"),
    ],
)
def test_policies_keep_or_drop(no_face: str, several: str, kept: str) -> None:
    findings = Findings({"no_face": no_face, "several_faces": several})
    assert list(COUNTS["path"][check_faces(COUNTS, COUNTS, findings)]) == list(kept)
    report = findings.report()
    assert {check: found["images"] for check, found in report.items()} == {
        "no_face": ["a"],
        "several_faces": ["c"],
    }
    assert list(findings.table()["path"]) == [path for path in "ac" if path not in kept]


@pytest.mark.parametrize("check", ["no_face", "several_faces"])
def test_a_policy_can_fail(check: str) -> None:
    findings = Findings({"no_face": "keep", "several_faces": "keep", check: "fail"})
    with pytest.raises(UserError, match=f"The check {check} finds 1 image"):
        check_faces(COUNTS, COUNTS, findings)


def test_misses_are_counted_by_group() -> None:
    manifest = pd.DataFrame(
        {
            "path": ["a", "b", "c"],
            "label": [0, 1, 1],
            "sha256": ["x", "y", "z"],
            "country": ["NA", "NA", None],
            "age": ["7", "7", "7"],
        }
    )
    assert missed_by_group(manifest, COUNTS) == {
        "label": {"0": {"images": 1, "no_face": 1}, "1": {"images": 2, "no_face": 0}}
    }
    manifest.loc[2, "country"] = "Chad"
    assert missed_by_group(manifest, COUNTS)["country"] == {
        "Chad": {"images": 1, "no_face": 0},
        "NA": {"images": 2, "no_face": 1},
    }
