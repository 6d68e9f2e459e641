import dataclasses
import logging
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from facegender.datasets.archive import ArchiveLimits
from facegender.datasets.folder import copy_folder
from facegender.errors import UserError
from tests.unit.test_raw import fill, read

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
    "README.md": "x",
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


def test_an_archive_is_guarded(tmp_path):
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as zipped:
        zipped.writestr("female/1.jpg", "a")
        zipped.writestr("../evil.jpg", "b")
    with pytest.raises(UserError, match="leads out"):
        copy_folder(tmp_path / "faces.zip", tmp_path / "box" / "target", LIMITS)
    assert read(tmp_path / "box") == {}


def test_links_inside_are_followed_and_others_are_counted(tmp_path, source, caplog):
    fill(tmp_path / "outside", {"secret.jpg": "secret"})
    (source / "Training/male/again.jpg").symlink_to(source / "Training/male/1.jpg")
    (source / "men").symlink_to("Training/male")
    (source / "outside").symlink_to(tmp_path / "outside")
    (source / "Training/male/outside.jpg").symlink_to(tmp_path / "outside/secret.jpg")
    (source / "Training/male/circle").symlink_to(source)
    (source / "Training/nowhere.jpg").symlink_to("missing.jpg")
    (source / "Training/itself.jpg").symlink_to("itself.jpg")
    with caplog.at_level(logging.WARNING):
        copy_folder(source, tmp_path / "target", LIMITS)
    # The circle is met twice: below Training/male and below men.
    assert "7 symbolic links in source" in caplog.text
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


def test_a_link_to_a_folder_is_a_source(tmp_path, source, caplog):
    (tmp_path / "link").symlink_to(source)
    copy_folder(tmp_path / "link", tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == WANTED
    assert caplog.text == ""


def test_a_fifo_is_passed_over(tmp_path, source):
    os.mkfifo(source / "pipe.jpg")
    copy_folder(source, tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == WANTED


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no folder or archive .*/nowhere"):
        copy_folder(tmp_path / "nowhere", tmp_path / "target", LIMITS)


@pytest.mark.parametrize("files", [{}, LITTER, {"people.csv": "d"}])
def test_a_source_without_images_is_an_error(tmp_path, files):
    (tmp_path / "source").mkdir()
    fill(tmp_path / "source", files)
    with pytest.raises(UserError, match="no image"):
        copy_folder(tmp_path / "source", tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == {}


def test_a_file_that_is_no_archive_is_an_error(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match="no archive"):
        copy_folder(tmp_path / "photo.jpg", tmp_path / "target", LIMITS)


def test_the_projects_own_data_is_no_source(tmp_path):
    fill(tmp_path / "data", {"processed/female/1.jpg": "a"})
    with pytest.raises(UserError, match="own data"):
        copy_folder(tmp_path / "data", tmp_path / "data" / ".raw.partial", LIMITS)


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (dataclasses.replace(LIMITS, max_files=3), "max_files of 3"),
        (dataclasses.replace(LIMITS, max_total_bytes=3), "max_total_bytes of 3"),
    ],
)
def test_a_folder_is_limited_too(tmp_path, source, limits, name):
    with pytest.raises(UserError, match=name):
        copy_folder(source, tmp_path / "target", limits)
    assert read(tmp_path / "target") == {}


@pytest.mark.parametrize("failing", ["os.scandir", "shutil.copyfile"])
def test_what_cannot_be_read_is_named(tmp_path, source, monkeypatch, failing):
    # Root reads what it has no permission for, so refuse it here.
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(failing, refuse)
    with pytest.raises(UserError, match=r"Cannot copy '.*source.*Permission denied"):
        copy_folder(source, tmp_path / "target", LIMITS)
    monkeypatch.undo()
    assert read(tmp_path / "target") == {}
