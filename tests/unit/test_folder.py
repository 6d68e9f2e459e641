import dataclasses
import json
import logging
import os
import shutil
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from unittest.mock import Mock

import pytest

from facegender.data.image_files import find_images, looks_like_image
from facegender.data.sources.archive import ArchiveLimits
from facegender.data.sources.folder import copy_folder, list_folder, name_rest, summarize
from facegender.errors import UserError
from stages.download import main as download
from stages.list import main as list_source
from tests.conftest import WITH_PERMISSIONS, fill, run_python
from tests.unit.conftest import composed
from tests.unit.test_raw import read

LIMITS = ArchiveLimits(max_total_bytes=10**9, max_ratio=100, max_files=10_000)
WANTED = {
    "Training/male/1.jpg": "a",
    "Training/female/2.PNG": "b",
    "dataset/test/women/3.jpeg": "c",
    "dataset/test/people.csv": "d",
}
LITTER = {
    ".DS_Store": "x",
    "Training/.hidden.jpg": "x",
    ".cache/female/4.jpg": "x",
    "__MACOSX/Training/male/._1.jpg": "x",
    "__MACOSX/Training/male/1.jpg": "x",
    "Training/male/Thumbs.db": "x",
}


@pytest.fixture
def source(tmp_path) -> Path:
    return fill(tmp_path / "source", WANTED | LITTER)


def test_a_folder_is_copied_without_litter(tmp_path, source):
    copy_folder(source, tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == WANTED
    assert read(source) == WANTED | LITTER


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
def test_an_archive_gives_what_its_folder_gives(tmp_path, source, kind):
    archive = Path(shutil.make_archive(str(tmp_path / "faces"), kind, source))
    copy_folder(archive, tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == WANTED


def test_notes_on_participants_are_no_pictures() -> None:
    """A PNM begins with P1 to P6, too, but its size follows."""
    assert not looks_like_image(b"P1 anna\nP2 eva\n")
    assert looks_like_image(b"P5\n# of a scanner\n80 40\n255\n")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_unknown_endings_are_judged_by_content_and_the_rest_is_named(
    tmp_path, source, kind, caplog
):
    photos = dict.fromkeys(("men/b.jpe", "men/c.jpg_large", "men/none"), "\x89PNG\r\n\x1a\n")
    photos |= {"men/a.pgm": "P5 1 1 255 a", "men/d.php": "GIF89a"}
    rest = {"README.md": "x", "men/more.zip": "PK\x03\x04", "men/more.rar": "Rar!", "men/empty": ""}
    for name, content in (photos | rest).items():
        path = source / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode("latin-1"))
    packed = source if kind == "folder" else Path(shutil.make_archive(str(source), kind, source))
    left_out = copy_folder(packed, tmp_path / "target", LIMITS)
    photos_found = {str(path) for path in find_images(tmp_path / "target")}
    assert photos_found == set(photos) | {name for name in WANTED if not name.endswith(".csv")}
    archive, other = "is an archive in the source: unpack it first", "is neither an image nor a CSV"
    assert left_out == {
        "README.md": other,
        "men/empty": other,
        "men/more.rar": archive,
        "men/more.zip": archive,
    }
    assert "Left out 4 item(s)" in caplog.text
    assert summarize(left_out) == {
        "left_out": {"men/more.rar": archive, "men/more.zip": archive},
        "other_files": {
            ".md": {"count": 1, "example": "README.md"},
            "none": {"count": 1, "example": "men/empty"},
        },
    }


def test_what_an_unpacked_source_has_beside_images_is_named(tmp_path, caplog):
    fill(tmp_path, {"more.zip": "PK\x03\x04", "a.jpg": "a", "b.csv": "b", ".DS_Store": "x"})
    assert name_rest(tmp_path, "ada/faces") == {
        "more.zip": "is an archive in the source: unpack it first"
    }
    assert "Left out 1 item(s) of ada/faces: 'more.zip'" in caplog.text


def test_spreadsheets_are_to_be_saved_as_csv(tmp_path):
    fill(tmp_path, {"a.XLSX": "PK\x03\x04", "b.tsv": "x", "c.docx": "x", "d.jpg": "a"})
    assert name_rest(tmp_path, "ada/faces") == {
        "a.XLSX": "is a table of another kind: save it as CSV",
        "b.tsv": "is a table of another kind: save it as CSV",
        "c.docx": "is neither an image nor a CSV",
    }


def test_an_archive_of_nothing_but_archives_says_which_to_unpack(tmp_path):
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as zipped:
        zipped.writestr("faces.zip", "PK\x03\x04")
        zipped.writestr("README.md", "x")
    with pytest.raises(UserError, match=r"no images, but archives: unpack 'faces\.zip' first"):
        copy_folder(tmp_path / "outer.zip", tmp_path / "target", LIMITS)


def test_a_folder_that_may_not_be_written_is_a_source(tmp_path, source):
    for path in (source, *source.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    copy_folder(source, tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == WANTED
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "target").rglob("*"))


def test_a_folder_that_cannot_be_read_is_named_in_predict_and_score(
    tmp_path, source, monkeypatch, caplog
):
    monkeypatch.setattr("os.scandir", refuse("test")(os.scandir))
    names = {str(path) for path in find_images(source)}
    assert names == {"Training/male/1.jpg", "Training/female/2.PNG"}
    assert "dataset/test' cannot be read and is left out: Permission denied" in caplog.text


def test_links_inside_are_followed_and_others_are_named(tmp_path, source, caplog):
    fill(tmp_path / "outside", {"secret.jpg": "secret"})
    (source / "Training/male/again.jpg").symlink_to(source / "Training/male/1.jpg")
    (source / "men").symlink_to("Training/male")
    (source / "outside").symlink_to(tmp_path / "outside")
    (source / "Training/male/outside.jpg").symlink_to(tmp_path / "outside/secret.jpg")
    (source / "Training/male/circle").symlink_to(source)
    (source / "Training/nowhere.jpg").symlink_to("missing.jpg")
    (source / "Training/itself.jpg").symlink_to("itself.jpg")
    with caplog.at_level(logging.WARNING):
        left_out = copy_folder(source, tmp_path / "target", LIMITS)
    # The circle is met twice: below Training/male and below men.
    assert sorted(left_out) == [
        "Training/itself.jpg",
        "Training/male/circle",
        "Training/male/outside.jpg",
        "Training/nowhere.jpg",
        "men/circle",
        "men/outside.jpg",
        "outside",
    ]
    assert "Left out 7 item(s) of source: 'Training/itself.jpg' is a link" in caplog.text
    male = {"1.jpg": "a", "again.jpg": "a"}
    assert read(tmp_path / "target") == WANTED | {
        f"{folder}/{name}": content
        for folder in ("Training/male", "men")
        for name, content in male.items()
    }
    assert not any(path.is_symlink() for path in (tmp_path / "target").rglob("*"))


def test_folders_that_link_to_one_another_end(tmp_path, source):
    (source / "a").mkdir()
    (source / "b").mkdir()
    (source / "a" / "b").symlink_to("../b")
    (source / "b" / "a").symlink_to("../a")
    copy_folder(source, tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == WANTED


def test_folders_that_each_link_twice_to_the_next_cost_no_power_of_two(tmp_path):
    source = tmp_path / "source"
    for level in range(40):
        (source / f"{level}").mkdir(parents=True)
        for name in "ab":
            (source / f"{level}" / name).symlink_to(f"../{level + 1}")
    fill(source, {"40/1.jpg": "a"})
    left_out = copy_folder(source, tmp_path / "target", LIMITS)
    paths = ["40", "39/a", "39/b", *(f"38/{first}/{last}" for first in "ab" for last in "ab")]
    assert read(tmp_path / "target") == {f"{path}/1.jpg": "a" for path in paths}
    assert len(left_out) == 8 * 38
    assert left_out["0/a/b/a"] == "is a link to a folder inside 2 others"


def test_a_listing_has_what_is_copied_and_what_is_not(tmp_path, source):
    os.mkfifo(source / "pipe.jpg")
    (source / ".dvcignore").write_text("*.jpg")
    fill(source, {"README.md": "x"})
    target = tmp_path / "raw"
    listing = list_folder(source, target, LIMITS, Path.read_text)
    pipe = {"pipe.jpg": "is a pipe or device", "README.md": "is neither an image nor a CSV"}
    assert listing == WANTED | pipe
    assert list_folder(source / "README.md", target, LIMITS, Path.read_text) == {"README.md": "x"}
    with pytest.raises(UserError, match="is not a folder or archive"):
        list_folder(source / "pipe.jpg", target, LIMITS, Path.read_text)
    with pytest.raises(UserError, match=r"dataset\.path is not set"):
        list_folder(Path("???"), target, LIMITS, Path.read_text)


@pytest.mark.parametrize("below", ["", "Training", "gone"])
def test_a_source_where_dvc_removes_files_is_refused_before_it_does(tmp_path, source, below):
    (tmp_path / "link").symlink_to(source)
    for path in (source, tmp_path / "link"):
        with pytest.raises(UserError, match=r"belongs to DVC, which removes.*Move your images"):
            list_folder(path / below, source, LIMITS, Path.read_text)
    with pytest.raises(UserError, match="contains this project's own data"):
        list_folder(tmp_path, source, LIMITS, Path.read_text)


def test_a_folder_of_links_out_of_it_says_how_to_copy_it(tmp_path, source):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "1.jpg").symlink_to(source / "Training/male/1.jpg")
    with pytest.raises(
        UserError, match=r"but links that lead out of it, such as '1\.jpg': .*cp -rL"
    ):
        copy_folder(snapshot, tmp_path / "target", LIMITS)


def test_a_link_to_a_folder_is_a_source(tmp_path, source, caplog):
    (tmp_path / "link").symlink_to(source)
    copy_folder(tmp_path / "link", tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == WANTED
    assert caplog.text == ""


def test_a_pipe_is_left_out_and_named(tmp_path, source):
    os.mkfifo(source / "pipe.jpg")
    (source / "folder.jpg" / "men").mkdir(parents=True)
    (source / "folder.jpg" / "men" / "5.jpg").write_text("e")
    left_out = copy_folder(source, tmp_path / "target", LIMITS)
    assert left_out == {"pipe.jpg": "is a pipe or device"}
    assert read(tmp_path / "target") == WANTED | {"folder.jpg/men/5.jpg": "e"}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_names_of_every_kind_arrive_and_those_that_are_no_text_are_spelt_out(tmp_path, kind):
    names = ["men/a b.jpg", "men/new\nline.JPG", "women/größe.jpeg", "women/#'\"%.png"]
    source = fill(tmp_path / "source", dict.fromkeys(names, "a"))
    (source / os.fsdecode(b"men/ren\xe9.jpg")).write_text("b")
    (source / "men/cr\r.jpg").write_text("c")
    if kind == "tar":
        with tarfile.open(tmp_path / "source.tar", "w") as tar:
            tar.add(source, ".")
        source = tmp_path / "source.tar"
    assert copy_folder(source, tmp_path / "target", LIMITS) == {}
    expected = dict.fromkeys(names, "a") | {r"men/ren\xe9.jpg": "b", r"men/cr\r.jpg": "c"}
    assert read(tmp_path / "target") == expected
    assert [str(path) for path in find_images(tmp_path / "target")] == sorted(expected)


def test_names_that_are_one_when_spelt_out_are_an_error(tmp_path):
    source = fill(tmp_path / "source", {r"men/ren\xe9.jpg": "a"})
    (source / os.fsdecode(b"men/ren\xe9.jpg")).write_text("b")
    with pytest.raises(UserError, match=r"be stored as 'men/ren.*Rename one"):
        copy_folder(source, tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == {}


def test_photos_that_are_not_decoded_are_taken_along_to_be_named(tmp_path, source):
    fill(source, {"men/phone.HEIC": "x"})
    copy_folder(source, tmp_path / "target", LIMITS)
    assert "men/phone.HEIC" in read(tmp_path / "target")
    assert PurePosixPath("men/phone.HEIC") in find_images(tmp_path / "target")


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"/nowhere.* is not a folder or archive.*absolute"
    ) as caught:
        copy_folder(tmp_path / "nowhere", tmp_path / "target", LIMITS)
    # It would drop the recipe, and labels from a table.
    assert "dataset=folder" not in str(caught.value)


def test_a_relative_path_starts_at_the_repository_also_in_the_clones_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fill(tmp_path / "root", {".dvc/config": "[core]\nno_scm = true\n"})
    fill(tmp_path / "faces", {"women/1.jpg": "a", "men/2.jpg": "b"})
    (tmp_path / "of-sweep/clone").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "of-sweep/clone")
    monkeypatch.setenv("FACEGENDER_ROOT", str(root))
    composed(Path(), "dataset=folder", "dataset.path=../faces")
    monkeypatch.setattr("sys.argv", ["list", "--listing=listing.json", "--raw=raw"])
    list_source()
    assert sorted(json.loads(Path("listing.json").read_text())) == ["men/2.jpg", "women/1.jpg"]
    monkeypatch.setattr("sys.argv", ["download", "--info=raw.json", "--raw=raw"])
    download()
    assert read(Path("raw")) == {"women/1.jpg": "a", "men/2.jpg": "b"}


def test_without_the_source_its_copy_can_be_used(tmp_path):
    target = tmp_path / "raw"
    with pytest.raises(UserError) as caught:
        list_folder(tmp_path / "nowhere", target, LIMITS, Path.read_text)
    assert "--downstream" not in str(caught.value)
    fill(target, {"women/1.jpg": "x"})
    with pytest.raises(UserError, match=r"raw already holds its images.*`--downstream split`"):
        list_folder(tmp_path / "nowhere", target, LIMITS, Path.read_text)


@pytest.mark.parametrize("files", [{}, LITTER, {"people.csv": "d"}])
def test_a_source_without_images_is_an_error(tmp_path, files):
    (tmp_path / "source").mkdir()
    fill(tmp_path / "source", files)
    with pytest.raises(UserError, match="no images"):
        copy_folder(tmp_path / "source", tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == {}


def test_the_projects_own_data_is_no_source(tmp_path):
    fill(tmp_path / "data", {"processed/female/1.jpg": "a"})
    with pytest.raises(UserError, match="own data"):
        copy_folder(tmp_path / "data", tmp_path / "data" / ".raw.partial", LIMITS)


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (dataclasses.replace(LIMITS, max_files=3), "more than 3 files.*raise archive.max_files"),
        (
            dataclasses.replace(LIMITS, max_total_bytes=3),
            "more than 3 bytes.*raise archive.max_gigabytes",
        ),
    ],
)
def test_a_folder_is_limited_too(tmp_path, source, limits, name):
    with pytest.raises(UserError, match=name):
        copy_folder(source, tmp_path / "target", limits)
    assert read(tmp_path / "target") == {}


# Root reads what it has no permission for, so these tests refuse it by other means.
def refuse(part):
    """Return a stand-in for a function of paths that refuses those with a name."""

    def call(original):
        def stand_in(path, *rest):
            if part in Path(path).parts:
                raise PermissionError(13, "Permission denied", str(path))
            return original(path, *rest)

        return stand_in

    return call


def test_a_file_and_a_folder_that_may_not_be_read_are_left_out_and_named(
    tmp_path, source, monkeypatch
):
    monkeypatch.setattr("os.scandir", refuse("test")(os.scandir))
    monkeypatch.setattr("shutil.copyfile", refuse("1.jpg")(shutil.copyfile))
    left_out = copy_folder(source, tmp_path / "target", LIMITS)
    assert left_out == {
        "Training/male/1.jpg": "cannot be read: permission denied",
        "dataset/test": "cannot be read: permission denied",
    }
    monkeypatch.undo()
    assert read(tmp_path / "target") == {"Training/female/2.PNG": "b"}


def test_permissions_of_the_disk_do_the_same(tmp_path, source):
    (source / "Training/male/1.jpg").chmod(0)
    code = (
        "import sys; from pathlib import Path\n"
        "from facegender.data.sources.archive import ArchiveLimits\n"
        "from facegender.data.sources.folder import copy_folder\n"
        "limits = ArchiveLimits(max_total_bytes=10**6, max_ratio=100, max_files=100)\n"
        "print(*copy_folder(*map(Path, sys.argv[1:]), limits))\n"
    )
    done = run_python(code, source, tmp_path / "target", prefix=WITH_PERMISSIONS)
    assert done.stdout == "Training/male/1.jpg\n"


def test_a_source_that_may_not_be_read_at_all_is_an_error(tmp_path, source, monkeypatch):
    monkeypatch.setattr("os.scandir", refuse("source")(os.scandir))
    with pytest.raises(UserError, match=r"Cannot copy '.*source.*Permission denied"):
        copy_folder(source, tmp_path / "target", LIMITS)
    monkeypatch.undo()
    assert read(tmp_path / "target") == {}


def test_a_full_disk_leaves_nothing(tmp_path, source, monkeypatch):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("shutil.copyfile", Mock(side_effect=full))
    with pytest.raises(UserError, match="No space left on device"):
        copy_folder(source, tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == {}
