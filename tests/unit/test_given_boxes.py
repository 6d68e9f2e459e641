"""A dataset's own boxes are taken instead of the detector's, and bad ones are named."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydantic import ValidationError

from facegender.data.checks import Findings, check_faces
from facegender.data.face_images import cut_image
from facegender.data.face_table import find_all_faces, read_faces
from facegender.data.given_boxes import read_boxes
from facegender.data.images import decode_picture
from facegender.data.labelling_notes import Notes
from facegender.data.manifest import write_table
from facegender.data.preprocessing import write_split
from facegender.data.raw_manifest import build_manifest
from facegender.errors import UserError
from facegender.faces.crop import cut_out
from facegender.faces.detector import Face
from facegender.faces.settings import FaceCrop
from facegender.params import Boxes, Crop, FilenameLabels, TableLabels

CROP = FaceCrop(margin=0.25, align=False, min_score=0.75, min_size=16)
CELEBA = Boxes(
    file="list_bbox*.csv", image="image_id", left="x_1", top="y_1", width="width", height="height"
)
TABLE = """image_id,x_1,y_1,width,height
good.png,40,30,60,80
good.png,40,30,60,80.0
empty.png,40,30,0,80
outside.png,400,30,60,80
words.png,here,30,60,80
several.png,10,10,20,20
several.png,60,40,50,50
gone.png,1,1,5,5
"""
NAMES = ["empty.png", "good.png", "none.png", "outside.png", "several.png", "words.png"]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Pictures without a face that the detector could find, and a table of boxes."""
    folder = tmp_path / "raw"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in NAMES:
        coarse = Image.fromarray(generator.integers(0, 256, (10, 12, 3), dtype=np.uint8))
        coarse.resize((200, 160)).save(folder / name)
    (folder / "list_bbox_celeba.csv").write_text(TABLE)
    return folder


def table_of(raw: Path, notes: Notes) -> pd.DataFrame:
    manifest = pd.DataFrame({"path": NAMES, "label": 1, "sha256": ""})
    return find_all_faces(manifest, raw, CROP, jobs=1, boxes=read_boxes(raw, NAMES, CELEBA, notes))


def test_usable_boxes_are_taken_and_others_named(raw: Path, tmp_path: Path) -> None:
    notes = Notes()
    table = table_of(raw, notes)
    assert dict(zip(table["path"], table["faces"], strict=True)) == {
        "empty.png": 0,
        "good.png": 1,
        "none.png": 0,
        "outside.png": 0,
        "several.png": 2,
        "words.png": 0,
    }
    problems = dict(zip(table["path"], table["bad_box"], strict=True))
    assert pd.isna([problems["good.png"], problems["several.png"]]).all()
    assert problems["empty.png"] == "the box is empty"
    assert problems["words.png"] == "the box is not four numbers"
    assert problems["none.png"] == "no box in the table"
    assert "lies outside: its centre is not within (200, 160)" in problems["outside.png"]
    assert notes.unmatched_rows["list_bbox_celeba.csv"]["first"] == "gone.png"

    write_table(table, tmp_path / "faces.csv")
    faces = read_faces(tmp_path / "faces.csv")
    assert faces["none.png"] is None
    assert (faces["several.png"].left, faces["several.png"].width) == (60, 50)
    manifest = pd.DataFrame({"path": ["good.png"], "label": 1, "sha256": ""})
    options = {"size": 32, "name": "train", "jobs": 1, "crop": CROP, "faces": faces}
    write_split(manifest, raw, tmp_path / "part", **options)
    given = Face(40, 30, 60, 80, *[0.0] * 5)
    expected = cut_out(decode_picture(raw / "good.png")[0], given, CROP, 32)
    np.testing.assert_array_equal(np.load(tmp_path / "part" / "images.npy")[0], expected)


def test_boxes_in_shares_of_the_picture_are_named(raw: Path) -> None:
    text = "image_id,x_1,y_1,width,height\ngood.png,0.2,0.2,0.3,0.5\nempty.png,0,0,1,1\n"
    (raw / "list_bbox_celeba.csv").write_text(text)
    table = table_of(raw, Notes()).set_index("path")
    for name in ("good.png", "empty.png"):
        assert "shares of the picture are not read" in table.loc[name, "bad_box"]
        assert table.loc[name, "faces"] == 0


def test_the_box_of_an_image_that_is_left_out_is_not_of_another(raw: Path) -> None:
    (raw / "ignored").mkdir()
    (raw / "empty.png").rename(raw / "ignored" / "good.png")
    rows = "/x/ignored/good.png,1,1,150,150\n/x/good.png,40,30,60,80\n"
    (raw / "list_bbox_celeba.csv").write_text("image_id,x_1,y_1,width,height\n" + rows)
    notes = Notes()
    assert read_boxes(raw, ["good.png"], CELEBA, notes) == {"good.png": [(40, 30, 60, 80)]}
    assert notes.unmatched_rows == notes.ambiguous_rows == {}


def test_a_table_of_boxes_without_a_file_column_is_not_called_skipped(
    raw: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notes = Notes()
    labels = FilenameLabels(
        kind="filename",
        pattern="(?P<label>.).*",
        female=("e", "g", "n"),
        male=("o", "s", "w"),
        ignore=(),
    )
    build_manifest(raw, female=[], male=[], ignore=[], labels=labels, boxes=CELEBA, notes=notes)
    assert notes.skipped_tables == {}
    assert "skipped" not in caplog.text


@pytest.mark.parametrize("kind", ["filename", "table"])
def test_boxes_are_not_metadata(raw: Path, kind: str) -> None:
    """Their table may have several rows for an image, and other columns."""
    meaning = {"female": ("f", "e", "g", "n"), "male": ("m", "o", "s", "w"), "ignore": ()}
    labels = {
        "filename": FilenameLabels(kind="filename", pattern="(?P<label>.).*", **meaning),
        "table": TableLabels(kind="table", file="*", image="file", label="sex", **meaning),
    }[kind]
    rows = ("several.png,10,10,20,20,7,m", "several.png,60,40,50,50,7,m", "good.png,4,3,60,80,9,f")
    table = "\n".join(["file,X_1,y_1,width,height,age,sex", *rows])
    (raw / "list_bbox_celeba.csv").write_text(table)
    options = {"female": [], "male": [], "ignore": [], "labels": labels, "max_unlabelled": 0.9}
    manifest = build_manifest(raw, boxes=CELEBA, **options).set_index("path")
    assert set(manifest) - {"sex"} == {"label", "sha256", "age"}
    assert dict(manifest["age"].dropna()) == {"several.png": "7", "good.png": "9"}


def test_the_detector_looks_where_no_box_is_usable(shared: Path, raw: Path) -> None:
    for name in ("empty.png", "good.png"):
        with Image.open(shared / "faces" / "male" / "03.jpg") as portrait:
            portrait.save(raw / name)
    table = table_of(raw, Notes()).set_index("path")
    assert table.loc["empty.png", "faces"] == 1
    assert table.loc["empty.png", "score"] > 0.75
    assert table.loc["good.png", "left"] == 40


@pytest.mark.parametrize(("policy", "kept"), [("keep", 6), ("drop", 2), ("fail", 0)])
def test_a_policy_decides_about_bad_boxes(raw: Path, policy: str, kept: int) -> None:
    table = table_of(raw, Notes())
    findings = Findings({"no_face": "keep", "several_faces": "keep", "bad_box": policy})
    if policy == "fail":
        with pytest.raises(UserError, match=r"The check bad_box finds 4 image\(s\).*empty\.png"):
            check_faces(table, table, findings)
        return
    assert check_faces(table, table, findings).sum() == kept
    assert findings.report()["bad_box"]["count"] == 4


def test_an_image_without_box_and_face_is_dropped_once(raw: Path) -> None:
    table = table_of(raw, Notes())
    findings = Findings({"no_face": "drop", "several_faces": "keep", "bad_box": "drop"})
    assert check_faces(table, table, findings).sum() == 2
    assert len(findings.table()) == 4
    assert sum(check["count"] for check in findings.report().values()) == 5  # one with 2 faces


def test_boxes_of_a_large_picture_are_those_of_the_file(tmp_path: Path) -> None:
    """Above 50 megapixels faces are cut out of the halved picture."""
    ramp = Image.linear_gradient("L").resize((9000, 6000)).convert("RGB")
    ramp.save(tmp_path / "large.png", compress_level=1)
    manifest = pd.DataFrame({"path": ["large.png"], "label": 1, "sha256": ""})
    boxes = {"large.png": [(8000.0, 4000.0, 400.0, 500.0)]}
    table = find_all_faces(manifest, tmp_path, CROP, jobs=1, boxes=boxes)
    assert list(table.loc[0, ["left", "top", "width", "height"]]) == [8000, 4000, 400, 500]
    face = Face(8000, 4000, 400, 500, *[0.0] * 5)
    halved, scale = decode_picture(tmp_path / "large.png")
    assert scale == 0.5
    expected = cut_out(halved, Face(4000, 2000, 200, 250, *[0.0] * 5), CROP, 32)
    np.testing.assert_array_equal(cut_image(tmp_path / "large.png", 32, CROP, face), expected)


def test_a_missing_table_or_column_is_named(raw: Path) -> None:
    with pytest.raises(UserError, match=r"image\.crop\.boxes\.file is 'boxes\.csv'"):
        read_boxes(raw, NAMES, CELEBA.model_copy(update={"file": "boxes.csv"}), Notes())
    with pytest.raises(UserError, match=r"list_bbox_celeba\.csv: it has no `w` column"):
        read_boxes(raw, NAMES, CELEBA.model_copy(update={"width": "w"}), Notes())


def test_boxes_have_no_eyes_to_align_by() -> None:
    values = {"margin": 0.25, "min_score": 0.75, "min_size": 16, "whole_from": 0.95, "jitter": 0.0}
    assert Crop(**values, align=False, boxes=CELEBA).boxes == CELEBA
    with pytest.raises(ValidationError, match="which only the detector finds"):
        Crop(**values, align=True, boxes=CELEBA)
