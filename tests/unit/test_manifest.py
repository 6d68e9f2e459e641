import unicodedata
from pathlib import Path, PurePosixPath

import pytest

from facegender.data.label_sources import label_images
from facegender.data.labelling_notes import Notes
from facegender.data.manifest import read_manifest, write_table
from facegender.data.raw_manifest import build_manifest
from facegender.errors import UserError

ALIASES = {"female": ["female", "women"], "male": ["male", "men"], "ignore": ["unknown"]}


def labels(*paths: str, **changes: list[str]) -> dict[str, int]:
    frame = label_images([PurePosixPath(path) for path in paths], **(ALIASES | changes))
    return dict(zip(frame["path"], frame["label"], strict=True))


def test_a_known_folder_above_the_image_decides_in_any_case() -> None:
    assert labels("Training/Male/a.jpg", "dataset/test/WOMEN/b.jpg", "men/studio/c.jpg") == {
        "Training/Male/a.jpg": 1,
        "dataset/test/WOMEN/b.jpg": 0,
        "men/studio/c.jpg": 1,
    }


LETTERS = {"female": ["female", "f", "0"], "male": ["male", "man", "m", "1"]}


def test_folders_of_both_classes_above_an_image_are_an_error() -> None:
    with pytest.raises(UserError, match=r"1 image.*both classes: 'female/man/maria\.png'"):
        labels("female/man/maria.png", "female/a.png", "male/b.png", **LETTERS)


@pytest.mark.parametrize("letters", ["AFM", "afm", "01"])
def test_one_letter_below_a_class_folder_is_not_a_class(letters: str) -> None:
    expected = {
        f"{name}/{letter}/0.jpg": label
        for label, name in enumerate(("female", "male"))
        for letter in letters
    }
    assert labels(*expected, **LETTERS) == expected
    # Nor below a folder that is neither shared nor a split.
    with pytest.raises(UserError, match=r"Cannot tell the class.*only at the top level"):
        labels("female/a.jpg", "male/a.jpg", "others/f/a.jpg", **LETTERS)


@pytest.mark.parametrize("above", ["", "faces/", "faces/Train/"])
@pytest.mark.parametrize("names", [("f", "m"), ("F", "M"), ("0", "1")])
def test_one_letter_is_a_class_at_the_top_level(above: str, names: tuple[str, str]) -> None:
    expected = {f"{above}{name}/a.jpg": label for label, name in enumerate(names)}
    if "Train" in above:
        expected |= {path.replace("Train", "Test"): label for path, label in expected.items()}
    assert labels(*expected, **LETTERS) == expected


def test_a_flat_folder_says_where_labels_come_from() -> None:
    with pytest.raises(UserError, match=r"labels come from folder names.*docs/own-data\.md"):
        labels("20_1_0_2017.jpg", "21_0_0_2017.jpg")


def test_images_beside_the_class_folders_are_named() -> None:
    with pytest.raises(UserError, match=r"1 image\(s\): they lie next to the class.*'c\.jpg'"):
        labels("c.jpg", "female/a.jpg", "male/b.jpg")


def test_spaces_and_unicode_form_of_a_folder_do_not_count() -> None:
    decomposed = unicodedata.normalize("NFD", "M\u00e4nner")
    names = {"female": ["frauen"], "male": ["m\u00e4nner"]}
    assert labels("FRAUEN /a.jpg", f" {decomposed}/b.jpg", **names) == {
        "FRAUEN /a.jpg": 0,
        f" {decomposed}/b.jpg": 1,
    }


@pytest.mark.parametrize("above", ["faces/", "faces/faces/", "archive (1)/#1 100%/"])
def test_folders_around_the_class_folders_do_not_count(above: str) -> None:
    expected = {f"{above}female/a.jpg": 0, f"{above}male/Anna/female.jpg": 1}
    assert labels(*expected) == expected


def test_a_file_name_is_no_folder() -> None:
    with pytest.raises(UserError, match="unsorted"):
        labels("unsorted/male", "female/a.jpg", "male/b.jpg")


def test_unknown_folders_are_listed_with_the_way_to_map_them() -> None:
    with pytest.raises(UserError) as caught:
        labels("ladies/a.jpg", "ladies/b.jpg", "men/c.jpg")
    assert "'ladies' (2)" in str(caught.value)
    assert "split.classes.female=['female','ladies']" in str(caught.value)
    assert labels("ladies/a.jpg", "men/c.jpg", female=["ladies"]) == {
        "ladies/a.jpg": 0,
        "men/c.jpg": 1,
    }


def test_ignored_folders_are_left_out() -> None:
    assert labels("unknown/a.jpg", "women/b.jpg", "men/c.jpg") == {"women/b.jpg": 0, "men/c.jpg": 1}


def test_a_class_without_images_is_an_error(make_images) -> None:
    expected = r"No image is labelled male: of 4.*2 are ignored.*left_out"
    with pytest.raises(UserError, match=expected):
        build_manifest(make_images(per_class=2), female=["female"], male=[], ignore=["male"])


def test_one_name_for_two_classes_is_an_error() -> None:
    with pytest.raises(UserError, match="two classes"):
        labels("f/a.jpg", female=["f"], male=["F"])


def test_metadata_joins_by_file_beside_its_csv(make_images) -> None:
    raw = make_images(per_class=2)
    (raw / "faces.csv").write_text("file,label,age\nfemale/000.png,male,31\nmale/001.png,male,58\n")
    manifest = build_manifest(raw, **ALIASES).set_index("path")
    assert list(manifest.columns) == ["label", "sha256", "metadata_label", "age"]
    assert manifest.loc["female/000.png", "label"] == 0, "the folder decides, not the CSV"
    assert manifest.loc["male/001.png", "age"] == "58"
    assert manifest["age"].isna().sum() == 2


def test_metadata_in_a_subfolder_is_relative_to_it(make_images) -> None:
    raw = make_images(per_class=1)
    (raw / "male" / "ages.csv").write_text("file,age\n000.png,40\n")
    assert build_manifest(raw, **ALIASES)["age"].fillna("-").tolist() == ["-", "40"]


def test_metadata_is_text_before_and_after_its_file(make_images, tmp_path: Path) -> None:
    raw = make_images(per_class=2)
    rows = [
        "female/000.png,NA,007",
        "female/001.png,None,1.50",
        "male/000.png,nan,",
        "male/001.png,,x",
    ]
    (raw / "faces.csv").write_text("\n".join(["file,country,id", *rows]))
    write_table(build_manifest(raw, **ALIASES), tmp_path / "a.csv")
    again = read_manifest(tmp_path / "a.csv")
    assert again["country"].fillna("-").tolist() == ["NA", "None", "nan", "-"]
    assert again["id"].fillna("-").tolist() == ["007", "1.50", "-", "x"]
    assert again["label"].tolist() == [0, 0, 1, 1]


def test_backslashes_and_a_comma_at_the_end_of_each_row_match(make_images) -> None:
    raw = make_images(per_class=1)
    (raw / "ages.csv").write_text("file,age\nfemale\\000.png,31,\nmale\\000.png,32,\n")
    assert build_manifest(raw, **ALIASES)["age"].tolist() == ["31", "32"]


def test_rows_that_match_no_image_are_counted_with_an_example_of_each_side(
    make_images, caplog: pytest.LogCaptureFixture
) -> None:
    raw = make_images(per_class=1)
    (raw / "ages.csv").write_text("file,age\ntrain/1.jpg,31\ntrain/2.jpg,31\nmale/000.png,32\n")
    notes = Notes()
    assert build_manifest(raw, **ALIASES, notes=notes)["age"].fillna("-").tolist() == ["-", "32"]
    assert notes.summary()["metadata"]["unmatched_rows"] == {
        "ages.csv": {
            "rows": 3,
            "unmatched": 2,
            "first": "train/1.jpg",
            "an_image": "female/000.png",
        }
    }
    assert "ages.csv: 2 of 3 rows match no image" in caplog.text
    assert "'train/1.jpg', and an image is 'female/000.png'" in caplog.text


def test_metadata_that_contradict_a_label_are_named(
    make_images, caplog: pytest.LogCaptureFixture
) -> None:
    """Numbers, columns with other values, and columns of one value are not taken for labels."""
    raw = make_images(per_class=2)
    (raw / "a.csv").write_text(
        "file,label,gender,eyes,size,hat\n"
        "female/000.png,Woman ,f,0,m,f\nfemale/001.png,female,m,1,f,f\n"
        "male/000.png,woman,m,0,s,f\nmale/001.png,,m,1,m,f\n"
    )
    notes = Notes()
    build_manifest(
        raw, female=["female", "woman", "f", "0"], male=["male", "m", "1"], ignore=[], notes=notes
    )
    assert notes.summary()["metadata"]["other_labels"] == {
        "gender": {"images": 1, "first": "female/001.png"},
    }
    (raw / "a.csv").write_text(
        "file,label\nfemale/000.png,male\nfemale/001.png,\nmale/000.png,woman\n"
    )
    build_manifest(raw, female=["female", "woman"], male=["male"], ignore=[], notes=notes)
    assert notes.other_labels["metadata_label"] == {"images": 2, "first": "female/000.png"}
    assert "metadata_label contradicts the label of 2 image(s)" in caplog.text
    assert "'female/000.png', whose metadata_label is male" in caplog.text


def test_other_values_beside_words_for_both_labels_hide_no_contradiction(make_images) -> None:
    raw = make_images(per_class=2)
    (raw / "a.csv").write_text(
        "file,gender,size\nfemale/000.png,Male,f\nfemale/001.png,unknown,m\n"
        "male/000.png,female,s\nmale/001.png,male,f\n"
    )
    notes = Notes()
    build_manifest(raw, **ALIASES, notes=notes)
    assert notes.other_labels == {"gender": {"images": 2, "first": "female/000.png"}}


def test_columns_named_as_ours_are_kept_apart(make_images) -> None:
    raw = make_images(per_class=1)
    (raw / "a.csv").write_text("file,row,predicted,age,age\nmale/000.png,7,x,1,2\n")
    columns = build_manifest(raw, **ALIASES).columns
    assert list(columns[3:]) == ["metadata_row", "metadata_predicted", "age", "age.5"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no `file` column"),
        ("Bild;Fotograf\n001.jpg;M\u00fcller\n".encode("latin-1"), "no `file` column"),
        ("file,who\nmale/000.png,M\u00fcller\n".encode("latin-1"), "can't decode"),
        (b"file,x\nmale/000.png,1,2\nfemale/000.png,1\n", "line 2 has more cells"),
    ],
)
def test_a_stray_csv_is_named_and_skipped(
    make_images, caplog: pytest.LogCaptureFixture, content: bytes, reason: str
) -> None:
    raw = make_images(per_class=1)
    (raw / "stray.csv").write_bytes(content)
    notes = Notes()
    manifest = build_manifest(raw, **ALIASES, notes=notes)
    assert list(manifest.columns) == ["path", "label", "sha256"]
    assert reason in notes.summary()["metadata"]["skipped_tables"]["stray.csv"]
    assert "stray.csv is skipped" in caplog.text
    assert reason in caplog.text


def test_rows_of_nothing_and_rows_said_twice_do_no_harm(make_images) -> None:
    raw = make_images(per_class=1)
    (raw / "a.csv").write_text("file,age\nmale/000.png,20\n,\n,\n\nmale/000.png,20\n")
    assert build_manifest(raw, **ALIASES)["age"].fillna("-").tolist() == ["-", "20"]


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images"):
        build_manifest(tmp_path, **ALIASES)
