"""Labels from tables and file names, on trees with the layouts of public datasets."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from facegender.data.labelling_notes import Notes
from facegender.data.raw_manifest import build_manifest
from facegender.errors import UserError
from facegender.params import FilenameLabels, TableLabels
from tests.conftest import fill
from tests.unit.conftest import composed
from tools.compose_params import ROOT

CELEBA = "image_id,5_o_Clock_Shadow,Male,Young"
TREES = {
    "celeba": {
        "img_align_celeba/img_align_celeba/000001.jpg": "x",
        "img_align_celeba/img_align_celeba/000002.jpg": "y",
        "list_attr_celeba.csv": f"{CELEBA}\n000001.jpg,-1,-1,1\n000002.jpg,1,1,-1\n",
        "list_eval_partition.csv": "image_id,partition\n000001.jpg,0\n000002.jpg,2\n",
    },
    "fairface": {
        "train/1.jpg": "x",
        "train/2.jpg": "y",
        "val/1.jpg": "z",
        "fairface_label_train.csv": "file,age,gender,race,service_test\n"
        "train/1.jpg,50-59,Male,East Asian,True\ntrain/2.jpg,3-9,Female,Indian,False\n",
        "fairface_label_val.csv": "file,age,gender,race,service_test\n"
        "val/1.jpg,20-29,Female,Black,False\n",
    },
    "utkface": {
        "UTKFace/26_1_0_20170116184024662.jpg.chip.jpg": "x",
        "UTKFace/39_0_4_20170116174525125.jpg.chip.jpg": "y",
        "UTKFace/24_0_1_20170116220224657 .jpg.chip.jpg": "z",
        "UTKFace/55_0_0_20170116232725357jpg.chip.jpg": "a",
    },
}
EXPECTED = {
    "celeba": ([0, 1], {"5_o_Clock_Shadow": ["-1", "1"], "Young": ["1", "-1"]}),
    "fairface": (
        [1, 0, 0],
        {
            "age": ["50-59", "3-9", "20-29"],
            "race": ["East Asian", "Indian", "Black"],
            "service_test": ["True", "False", "False"],
        },
    ),
    # Sorted by name. Unlike in most datasets, 0 is male.
    "utkface": (
        [1, 0, 1, 1],
        {
            "age": ["24", "26", "39", "55"],
            "race": ["1", "0", "4", "0"],
            "date": [
                *("20170116220224657", "20170116184024662", "20170116174525125"),
                "20170116232725357",
            ],
        },
    ),
}


def label(folder: Path, labels: Any, notes: Notes | None = None, **options: Any) -> pd.DataFrame:
    return build_manifest(
        folder, female=["female"], male=["male"], ignore=[], labels=labels, notes=notes, **options
    )


TABLE = TableLabels(
    kind="table",
    file="labels.csv",
    image="image",
    label="label",
    female=("f", "0"),
    male=("m", "1"),
    ignore=("?",),
)
NAME = FilenameLabels(
    kind="filename",
    pattern=r"(?P<label>.)_(?P<row>.*)\.(?P<path>jpg)",
    female=("f",),
    male=("m",),
    ignore=("x",),
)


@pytest.mark.parametrize("dataset", TREES)
@pytest.mark.parametrize("above", ["", "downloaded/FairFace"])
def test_public_datasets_are_labelled_by_their_own_files(
    dataset: str, above: str, tmp_path: Path
) -> None:
    labels = composed(tmp_path, f"dataset={dataset}", "dataset.path=x").dataset.labels
    fill(tmp_path / "raw" / above, TREES[dataset])
    manifest = label(tmp_path / "raw", labels)
    expected, metadata = EXPECTED[dataset]
    assert manifest["label"].tolist() == expected
    assert manifest["sha256"].str.len().eq(64).all()
    assert manifest.iloc[:, 3:].to_dict("list") == metadata


@pytest.mark.parametrize("labels", [TABLE, NAME])
def test_class_folders_that_contradict_labels_from_elsewhere_are_named(
    labels: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not alphabetical folders, nor one that all images share."""
    names = ["Female/f_1.jpg", "Female/m_2.jpg", "male/m_3.jpg", "male/f_4.jpg", "new/f_5.jpg"]
    rows = "".join(f"{name},{name.rpartition('/')[2][0]}\n" for name in names)
    fill(tmp_path, {**dict.fromkeys(names, "?"), "labels.csv": f"image,label\n{rows}"})
    notes = Notes()
    build_manifest(
        tmp_path, female=["female"], male=["male"], ignore=[], labels=labels, notes=notes
    )
    assert notes.other_labels == {"class folder": {"images": 2, "first": "Female/m_2.jpg"}}
    assert "the class folder contradicts the label of 2 image(s), which stays" in caplog.text
    assert "'Female/m_2.jpg', whose class folder is female" in caplog.text


def test_answers_are_no_words_for_labels_in_other_columns(tmp_path: Path) -> None:
    labels = TABLE.model_copy(update={"female": ("false",), "male": ("true",)})
    table = "image,label,smiles\n1.jpg,False,True\n2.jpg,True,False\n"
    fill(tmp_path, {"1.jpg": "a", "2.jpg": "b", "labels.csv": table})
    notes = Notes()
    assert label(tmp_path, labels, notes)["label"].tolist() == [0, 1]
    assert notes.other_labels == {}


def test_folders_that_are_no_classes_contradict_no_label(tmp_path: Path) -> None:
    names = ["men/f/f_1.jpg", "men/m/f_2.jpg", "men/f/m_3.jpg", "men/men/m_4.jpg"]
    fill(tmp_path, dict.fromkeys(names, "?"))
    notes = Notes()
    options: dict[str, Any] = {"female": ["women", "f"], "male": ["men", "m"], "ignore": []}
    build_manifest(tmp_path, **options, labels=NAME, notes=notes)
    assert notes.other_labels == {}


def test_a_name_of_utkface_without_race_is_left_out_and_named(tmp_path: Path) -> None:
    labels = composed(tmp_path, "dataset=utkface", "dataset.path=x").dataset.labels
    ambiguous = "UTKFace/61_1_20170109142408075.jpg.chip.jpg"
    fill(tmp_path / "raw", {**TREES["utkface"], ambiguous: "?"})
    notes = Notes()
    assert len(label(tmp_path / "raw", labels, notes, max_unlabelled=0.2)) == 4
    assert notes.summary()["unlabelled"] == {"count": 1, "images": [ambiguous]}
    assert notes.table()["check"].tolist() == ["unlabelled"]
    with pytest.raises(UserError, match=r"1 of 5 images have no label.*61_1_2017.*pattern"):
        label(tmp_path / "raw", labels, max_unlabelled=0.1)


IMAGES = {"a/1.jpg": "1", "a/2.jpg": "2", "b/3.jpg": "3"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "1.jpg,m\n2.jpg,f\n3.jpg,X\n",
            r"Unknown .* of labels\.csv: 'X' \(1\).*dataset\.labels\.female",
        ),
        ("1.jpg,m\n2.jpg,f\n3.jpg,\n", r"Unknown .* of labels\.csv: '' \(1\)"),
        ("", r"3 of 3 images have no label.*'a/1\.jpg' has no row"),
        ("1.jpg,m\n2.jpg,f\n", r"1 of 3 images have no label.*'b/3\.jpg' has no row"),
        ("1.jpg,m\n2.jpg,f\n4.jpg,f\n", r"1 of 3 rows match no image, such as '4\.jpg'"),
        (
            "1.jpg,m\n2.jpg,f\n3.jpg,f\na/1.jpg,f\n",
            r"1 image.*'a/1\.jpg': its label is 'm' in labels\.csv and 'f' in labels\.csv",
        ),
        ("1.jpg,m\n2.jpg,m\n3.jpg,?\n", r"No image is labelled female.* 1 are ignored"),
    ],
)
def test_a_table_that_disagrees_with_the_images_is_an_error(
    rows: str, message: str, tmp_path: Path
) -> None:
    fill(tmp_path, {**IMAGES, "labels.csv": "image,label\n" + rows})
    with pytest.raises(UserError, match=message):
        label(tmp_path, TABLE)


def test_rows_of_one_image_agree_when_their_labels_mean_the_same(tmp_path: Path) -> None:
    rows = "1.jpg,M\n1.jpg, m\n2.jpg,f\na/2.jpg, F\n3.jpg,f\n3.jpg,\n"
    fill(tmp_path, {**IMAGES, "labels.csv": "image,label\n" + rows})
    assert label(tmp_path, TABLE)["label"].tolist() == [1, 0, 0]
    # An unknown value does not become a label of that number.
    (tmp_path / "labels.csv").write_text("image,label\n1.jpg,M\n2.jpg,f\n3.jpg,0\n")
    with pytest.raises(UserError, match=r"Unknown .* of labels\.csv: '0' \(1\)"):
        label(tmp_path, TABLE.model_copy(update={"female": ("f",)}))


def test_a_row_of_an_excluded_image_means_no_other(tmp_path: Path) -> None:
    """Absolute paths match by how they end, so the row of a/1.jpg would name b/1.jpg, too."""
    rows = "C:\\x\\a\\1.jpg,f\nC:\\x\\a\\2.jpg,f\nC:\\x\\b\\1.jpg,m\n"
    images = {"a/1.jpg": "1", "a/2.jpg": "2", "b/1.jpg": "3"}
    fill(tmp_path, {**images, "labels.csv": "image,label\n" + rows})
    notes = Notes()
    manifest = label(tmp_path, TABLE, notes, exclude=["a/1.jpg"])
    assert manifest["path"].tolist() == ["a/2.jpg", "b/1.jpg"]
    assert manifest["label"].tolist() == [0, 1]
    assert notes.unmatched_rows == {}


def test_a_row_whose_image_is_gone_from_its_folder_means_none_of_another(tmp_path: Path) -> None:
    rows = "/x/women/1.jpg,f\n/x/women/4.jpg,f\n/x/men/3.jpg,m\n"
    images = {"women/1.jpg": "1", "men/3.jpg": "2", "men/4.jpg": "3"}
    fill(tmp_path, {**images, "labels.csv": "image,label\n" + rows})
    notes = Notes()
    assert label(tmp_path, TABLE, notes, max_unlabelled=0.5)["label"].tolist() == [1, 0]
    assert list(notes.unlabelled) == ["men/4.jpg"]
    assert notes.unmatched_rows["labels.csv"]["first"] == "/x/women/4.jpg"


def test_a_row_without_a_name_is_counted(tmp_path: Path) -> None:
    """Cells that were merged in a spreadsheet hold their value in the first row alone."""
    rows = "1.jpg,m\n,f\n2.jpg,f\n3.jpg,m\n,\n"
    fill(tmp_path, {**IMAGES, "labels.csv": "image,label\n" + rows})
    notes = Notes()
    assert len(label(tmp_path, TABLE, notes)) == 3
    assert notes.unmatched_rows["labels.csv"] == {
        "rows": 4,
        "unmatched": 1,
        "first": "",
        "an_image": "a/1.jpg",
    }


def test_a_row_that_fits_two_images_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path, {**IMAGES, "b/1.jpg": "4", "labels.csv": "image,label\n1.jpg,m\n"})
    with pytest.raises(UserError, match=r"names '1\.jpg', which fits 2 images: 'a/1\.jpg', 'b/1"):
        label(tmp_path, TABLE)


@pytest.mark.parametrize(
    ("name", "header", "message"),
    [
        ("a/other.csv", "image,label", r"no such file. CSVs found: other\.csv\."),
        ("labels.csv", "file,label", "no `image` column"),
        ("labels.csv", "image,gender", "no `label` column"),
    ],
)
def test_a_table_or_column_that_is_not_there_is_named(
    name: str, header: str, message: str, tmp_path: Path
) -> None:
    fill(tmp_path, {**IMAGES, name: f"{header}\n1.jpg,m\n"})
    with pytest.raises(UserError, match=message):
        label(tmp_path, TABLE)


def test_the_tables_that_a_pattern_finds_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A forgotten copy of a table labels an image whose row has been deleted."""
    caplog.set_level("INFO")
    fill(tmp_path, {"1.jpg": "x", "2.jpg": "y", "labels.csv": "image,label\n1.jpg,f\n2.jpg,m\n"})
    table = TABLE.model_copy(update={"file": "*.csv"})
    label(tmp_path, table)
    assert "labels come from" not in caplog.text
    fill(tmp_path, {"old.csv": "image,label\n1.jpg,f\n", "labels.csv": "image,label\n2.jpg,m\n"})
    assert label(tmp_path, table)["label"].tolist() == [0, 1]
    assert "labels come from 2 CSVs: labels.csv, old.csv" in caplog.text


def test_brackets_in_the_name_of_a_table_are_letters(tmp_path: Path) -> None:
    fill(tmp_path, {**IMAGES, "labels [2].csv": "image,label\n1.jpg,m\n2.jpg,f\n3.jpg,f\n"})
    table = TABLE.model_copy(update={"file": "Labels [2].csv"})
    assert label(tmp_path, table)["label"].tolist() == [1, 0, 0]


def test_values_and_paths_are_read_as_people_write_them(tmp_path: Path) -> None:
    rows = "image,label,path,age,value\na\\1.jpg, M ,007,,\nb/3.jpg,F,NA,9,\n2.jpg,?,x,8,5\n"
    fill(tmp_path, {**IMAGES, "labels.csv": rows, "ages.csv": "file,age\na/1.jpg,30\n"})
    manifest = label(tmp_path, TABLE).fillna("-")
    assert manifest["path"].tolist() == ["a/1.jpg", "b/3.jpg"]
    assert manifest["label"].tolist() == [1, 0]
    assert manifest["metadata_path"].tolist() == ["007", "NA"]
    assert manifest["age"].tolist() == ["-", "9"]
    assert manifest["metadata_age"].tolist() == ["30", "-"]


@pytest.mark.parametrize(
    ("dataset", "images"),
    [("table", ("1.jpg", "2.jpg")), ("filename", ("0_1.jpg", "1_2.jpg"))],
)
def test_numbers_are_labels_only_where_somebody_says_which(
    dataset: str, images: tuple[str, str], tmp_path: Path
) -> None:
    """In UTKFace and many tables 1 is female, in CelebA and others male."""
    overrides = [f"dataset={dataset}", "dataset.path=x"]
    if dataset == "filename":
        overrides.append("dataset.labels.pattern='(?P<label>.)_.*'")
    tables = {"labels.csv": "image,label\n1.jpg,0\n2.jpg,1\n"} if dataset == "table" else {}
    fill(tmp_path / "raw", {**{name: name for name in images}, **tables})
    labels = composed(tmp_path, *overrides).dataset.labels
    with pytest.raises(
        UserError, match=r"Unknown values .*: '0' \(1\), '1' \(1\).*labels\.female"
    ) as caught:
        label(tmp_path / "raw", labels)
    advice = re.findall('-S "(.*?)"', str(caught.value))
    labels = composed(tmp_path, *overrides, *advice).dataset.labels
    assert (labels.female, labels.ignore) == (("f", "lady"), ("unknown",))
    overrides += ["dataset.labels.female=[1]", "dataset.labels.male=[0]"]
    labels = composed(tmp_path, *overrides).dataset.labels
    assert label(tmp_path / "raw", labels)["label"].tolist() == [1, 0]


def test_words_and_class_folders_that_contradict_numbers_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The user took 0 for female, and in this table it is male."""
    fill(
        tmp_path,
        {
            **{name: name for name in ("both/male/female/3.jpg", "female/1.jpg", "male/1.jpg")},
            "labels.csv": "image,label,sex,sees\n3.jpg,1,,\n"
            "female/1.jpg,1,Female,m\nmale/1.jpg,0,Male,h\n",
        },
    )
    notes = Notes()
    assert label(tmp_path, TABLE, notes)["label"].tolist() == [1, 1, 0]
    contradicted = {"images": 2, "first": "female/1.jpg"}
    assert notes.other_labels == {"sex": contradicted, "class folder": contradicted}
    assert (
        "the class folder contradicts the label of 2 image(s), which stays: the first is "
        "'female/1.jpg', whose class folder is female"
    ) in caplog.text
    # Spanish: m is mujer, although it is also a class folder's name for male.
    spanish = TABLE.model_copy(update={"female": ("1", "m"), "male": ("0", "h")})
    notes = Notes()
    build_manifest(
        tmp_path, female=["female"], male=["male", "m"], ignore=[], labels=spanish, notes=notes
    )
    assert notes.other_labels == {}
    # Class folders may be numbers, too.
    raw = fill(
        tmp_path / "raw",
        {"0/1.jpg": "x", "1/2.jpg": "y", "a.csv": "file,sex\n0/1.jpg,Male\n1/2.jpg,Female\n"},
    )
    build_manifest(raw, female=["0"], male=["1"], ignore=[], notes=notes)
    assert notes.other_labels == {"sex": {"images": 2, "first": "0/1.jpg"}}


def test_groups_of_a_name_are_metadata_and_values_can_be_ignored(tmp_path: Path) -> None:
    fill(tmp_path, {name: name for name in ("F_1.jpg", "m_NA.jpg", "x_3.jpg")})
    notes = Notes()
    manifest = label(tmp_path, NAME, notes)
    assert manifest["label"].tolist() == [0, 1]
    assert manifest["metadata_row"].tolist() == ["1", "NA"]
    assert manifest["metadata_path"].tolist() == ["jpg", "jpg"]
    assert notes.ignored == 1


@pytest.mark.parametrize(
    ("pattern", "message"), [("(", "regular expression"), ("(?P<sex>.)", "group")]
)
def test_a_pattern_without_label_is_an_error(pattern: str, message: str, tmp_path: Path) -> None:
    overrides = ["dataset=filename", "dataset.path=x", f"dataset.labels.pattern='{pattern}'"]
    with pytest.raises(UserError, match=message):
        composed(tmp_path, *overrides)
    with pytest.raises(UserError, match=r"pattern.* needs a group \(\?P<label>"):
        composed(tmp_path, *overrides[:2])


def test_every_dataset_of_conf_is_in_the_document() -> None:
    document = (ROOT / "docs" / "own-data.md").read_text()
    names = {path.stem for path in (ROOT / "conf" / "dataset").iterdir()} - {"sample"}
    assert sorted(name for name in names if f"dataset={name}" not in document) == []
