"""CSVs as people and programs write them, beside images as disks name them."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest

from facegender.data.labelling_notes import Notes
from facegender.data.raw_manifest import build_manifest
from facegender.errors import UserError
from facegender.params import TableLabels
from tests.conftest import fill

NFC, NFD = "f\u00fcr.png", unicodedata.normalize("NFD", "f\u00fcr.png")
# Of two images each, all of which are to get the ages 20 and 30.
CSVS: dict[str, tuple[list[str], bytes]] = {
    "semicolons": (["a.png", "b.png"], b"file;age;score\na.png;20;3,5\nb.png;30;4,5\n"),
    "tabs": (["a.png", "b.png"], b"file\tage\na.png\t20\nb.png\t30\n"),
    "line-that-tells-the-separator": (["a.png", "b.png"], b"sep=;\nfile;age\na.png;20\nb.png;30\n"),
    "byte-order-mark": (["a.png", "b.png"], b"\xef\xbb\xbffile,age\r\na.png,20\r\nb.png,30\r\n"),
    "utf-16": (["a.png", "b.png"], "file\tage\na.png\t20\nb.png\t30\n".encode("utf-16")),
    "line-ends-of-old-macs": (["a.png", "b.png"], b"file,age\ra.png,20\rb.png,30\r"),
    "header-in-another-case": (["a.png", "b.png"], b'"File" , age\na.png,20\nb.png,30\n'),
    "spaces-around-names": (["a.png", "b.png"], b"file,age\n a.png,20\nb.png ,30\n"),
    "commas-and-quotes-in-names": (
        ["a, b.png", 'c "d".png'],
        b'file,age\n"a, b.png",20\n"c ""d"".png",30\n',
    ),
    "spaces-around-values": (["a.png", "b.png"], b"file,age\na.png, 20\nb.png,30 \n"),
    "quotes-behind-spaces": (
        ["a, b.png", "c.png"],
        b'"file", "who", "age"\n"a, b.png", "Doe, A", "20"\n"c.png", "Roe, B", "30"\n',
    ),
    "cells-of-several-lines": (
        ["a.png", "b.png"],
        b'file,note,age\na.png,"first, of\ntwo, lines",20\nb.png,"he said ""so""",30\n',
    ),
    "names-in-another-case": (["a.png", "IMG.JPG"], b"file,age\nA.PNG,20\nimg.jpg,30\n"),
    "names-of-a-mac": (["a.png", NFD], f"file,age\na.png,20\n{NFC},30\n".encode()),
    "names-from-a-mac": (["a.png", NFC], f"file,age\na.png,20\n{NFD},30\n".encode()),
    "ids-without-ending": (["001.png", "002.x.jpeg"], b"file,age\n001,20\n002.x,30\n"),
    "paths-of-another-machine": (
        ["women/a.png", "men/b.png"],
        b"file,age\nC:\\faces\\women\\a.png,20\n/home/me/faces/men/b.png,30\n",
    ),
    "names-without-folders": (["women/a.png", "men/b.png"], b"file,age\na.png,20\nb.png,30\n"),
    "folders-from-where-the-table-was": (
        ["women/a.png", "men/b.png"],
        b"file,age\n./women/a.png,20\nwomen/../men/b.png,30\n",
    ),
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Fill a folder; files without a content get one each of their own."""
    named = enumerate(files.items())
    return fill(folder, {name: content or str(number) for number, (name, content) in named})


def build(folder: Path, notes: Notes | None = None, **options: Any) -> dict[str, dict[str, Any]]:
    """Return the rows of the manifest by path, with - for an empty cell."""
    classes: dict[str, Any] = {"female": ["women"], "male": ["men"], "ignore": []}
    manifest = build_manifest(folder, **classes, notes=notes, **options)
    return manifest.fillna("-").set_index("path").T.to_dict()


def ages(folder: Path, notes: Notes | None = None) -> dict[str, str]:
    return {path: row["age"] for path, row in build(folder, notes).items()}


@pytest.mark.parametrize("name", ["ages.csv", "AGES.CSV"])
@pytest.mark.parametrize("case", CSVS)
def test_a_csv_is_read_as_people_write_it(case: str, name: str, tmp_path: Path) -> None:
    images, content = CSVS[case]
    if "/" not in images[0]:
        # Each image in a folder of its own, with its table.
        for folder, image in zip(("women", "men"), images, strict=True):
            write(tmp_path / folder, {image: b"", name: content})
        images = [f"women/{images[0]}", f"men/{images[1]}"]
    else:
        write(tmp_path, dict.fromkeys(images, b"") | {name: content})
    assert ages(tmp_path) == dict(zip(images, ["20", "30"], strict=True))


def test_a_name_that_is_written_otherwise_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = b"file,age\nmen/b.png,30\nWomen/A.png,20\n"
    write(tmp_path, {"women/a.png": b"", "men/b.png": b"", "t.csv": table})
    notes = Notes()
    assert ages(tmp_path, notes) == {"women/a.png": "20", "men/b.png": "30"}
    assert notes.summary()["metadata"]["renamed_rows"] == {
        "t.csv": {"rows": 2, "renamed": 1, "first": "Women/A.png", "image": "women/a.png"}
    }
    assert "1 of 2 rows name an image by another case" in caplog.text


def test_folders_of_another_machine_are_counted_and_those_of_the_table_are_not(
    tmp_path: Path,
) -> None:
    table = b"file,age\n../women/a.png,20\nC:\\faces\\men\\b.png,30\n"
    write(tmp_path, {"women/a.png": b"", "men/b.png": b"", "tables/t.csv": table})
    notes = Notes()
    assert ages(tmp_path, notes) == {"women/a.png": "20", "men/b.png": "30"}
    (rows,) = notes.summary()["metadata"]["renamed_rows"].values()
    assert (rows["renamed"], rows["first"]) == (1, r"C:\faces\men\b.png")


@pytest.mark.parametrize(
    "notes_column",
    [('"left', "x", "x"), ('"left', 'right"x', "x"), ("x", "x", '"cut off'), ("x", '"a', "b")],
)
def test_a_quote_that_is_not_closed_takes_no_rows(
    notes_column: tuple[str, ...], tmp_path: Path
) -> None:
    images = dict.fromkeys(("women/1.png", "men/2.png", "men/3.png"), b"")
    rows = zip(images, notes_column, strict=True)
    table = "\n".join(["file,note", *(f"{name},{note}" for name, note in rows)]).encode()
    notes = Notes()
    assert build(write(tmp_path, images | {"t.csv": table}), notes).keys() == images.keys()
    assert "is not closed" in notes.skipped_tables["t.csv"]


def test_values_that_look_alike_are_one_group(tmp_path: Path) -> None:
    images = dict.fromkeys(("women/1.png", "men/2.png", "men/3.png"), b"")
    ann, composed = NFD.removesuffix(".png"), NFC.removesuffix(".png")
    table = f"file,person\nwomen/1.png, {ann}\nmen/2.png,{composed} \nmen/3.png, \n".encode()
    manifest = build(write(tmp_path, images | {"t.csv": table}))
    assert [manifest[path]["person"] for path in images] == [composed, composed, "-"]


def test_the_same_case_comes_first(tmp_path: Path) -> None:
    table = b"file,age\na.png,20\nA.png,30\n"
    write(tmp_path, {"women/a.png": b"", "men/A.png": b"", "t.csv": table})
    assert ages(tmp_path) == {"women/a.png": "20", "men/A.png": "30"}


def test_a_row_that_fits_several_images_is_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = b"file,age\n1.png,20\n2.png,30\n"
    images = dict.fromkeys(("women/1.png", "men/1.png", "men/2.png"), b"")
    write(tmp_path, images | {"t.csv": table})
    notes = Notes()
    assert ages(tmp_path, notes) == {"women/1.png": "-", "men/1.png": "-", "men/2.png": "30"}
    assert notes.summary()["metadata"]["ambiguous_rows"] == {
        "t.csv": {
            "rows": 2,
            "ambiguous": 1,
            "first": "1.png",
            "fitting": 2,
            "images": ["men/1.png", "women/1.png"],
        }
    }
    assert "1 of 2 rows fit several images and are left out; the first is '1.png'" in caplog.text


def test_a_table_is_about_the_images_below_it(tmp_path: Path) -> None:
    """A row whose image is gone does not describe another dataset's image of that name."""
    images = dict.fromkeys(("one/women/1.png", "two/men/2.png"), b"")
    write(tmp_path, images | {"two/t.csv": b"file,age\n1.png,20\n2.png,30\n"})
    assert ages(tmp_path) == {"one/women/1.png": "-", "two/men/2.png": "30"}


def test_a_table_in_a_folder_without_images_is_about_all(tmp_path: Path) -> None:
    images = dict.fromkeys(("images/women/1.png", "images/men/2.png"), b"")
    write(tmp_path, images | {"labels/t.csv": b"file,age\n1.png,20\n../images/men/2.png,30\n"})
    assert ages(tmp_path) == {"images/women/1.png": "20", "images/men/2.png": "30"}


def test_a_row_that_ends_before_its_name_is_counted(tmp_path: Path) -> None:
    images = dict.fromkeys(("women/1.png", "men/2.png"), b"")
    write(tmp_path, images | {"t.csv": b"age,file\n20,1.png\n30,2.png\ntotal 50\n\n"})
    notes = Notes()
    assert ages(tmp_path, notes) == {"women/1.png": "20", "men/2.png": "30"}
    (rows,) = notes.unmatched_rows.values()
    assert (rows["rows"], rows["unmatched"], rows["first"]) == (3, 1, "")


def test_zeros_that_a_spreadsheet_took_away_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = b"file,age\n1.png,20\n002.png,30\n"
    write(tmp_path, {"women/001.png": b"", "men/002.png": b"", "t.csv": table})
    assert ages(tmp_path) == {"women/001.png": "-", "men/002.png": "30"}
    assert "1 of 2 rows match no image; the first is '1.png'" in caplog.text


def test_tables_of_one_image_are_put_together(tmp_path: Path) -> None:
    images = dict.fromkeys(("women/1.png", "men/2.png"), b"")
    tables = {
        "ages.csv": b"file,age\nmen/2.png,30\nwomen/1.png,20\n",
        "more.csv": b"file,country,age\nwomen/1.png,Fiji,\nwomen/1.png,,20\n",
    }
    manifest = build(write(tmp_path, images | tables))
    assert [manifest[path]["age"] for path in images] == ["20", "30"]
    assert [manifest[path]["country"] for path in images] == ["Fiji", "-"]
    (tmp_path / "more.csv").write_bytes(b"file,age\nwomen/1.png,21\n")
    with pytest.raises(
        UserError,
        match=r"1 image.* 'women/1\.png': its age is '20' in ages\.csv and '21' in more\.csv\.",
    ):
        build(tmp_path)


def test_a_csv_of_no_images_beside_the_table_of_labels_does_no_harm(tmp_path: Path) -> None:
    labels = TableLabels(
        kind="table",
        file="*.csv",
        image="image",
        label="label",
        female=("woman", "female"),
        male=("man", "male"),
        ignore=(),
    )
    images = dict.fromkeys(("p/1.png", "p/2.png"), b"")
    tables = {
        "a.csv": b"",
        "ages.csv": b"file,age\np/1.png,20\n",
        "sample_submission.csv": b"id,prediction\n1,0\n",
        "train.csv": b"Image;LABEL\n1.png; Woman\n2.png;MALE \n",
    }
    notes = Notes()
    manifest = build(write(tmp_path, images | tables), notes, labels=labels)
    assert [manifest[path]["label"] for path in images] == [0, 1]
    assert [manifest[path]["age"] for path in images] == ["20", "-"]
    assert sorted(notes.skipped_tables) == ["a.csv", "sample_submission.csv"]
    (tmp_path / "train.csv").write_bytes(b"image,label\n1.png,woman,3\n")
    with pytest.raises(UserError, match=r"labels from train\.csv: line 2 has more cells"):
        build(tmp_path, labels=labels)


def test_litter_and_folders_named_csv_are_no_tables(tmp_path: Path) -> None:
    files = dict.fromkeys(("women/1.png", "men/2.png", "old.csv/men/3.png"), b"")
    litter = dict.fromkeys(("._t.csv", "__MACOSX/t.csv"), b"\0\5\x16\7\xff")
    notes = Notes()
    assert len(build(write(tmp_path, files | litter), notes)) == 3
    assert notes.skipped_tables == {}
