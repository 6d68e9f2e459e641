import bz2
import dataclasses
import io
import lzma
import os
import stat
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from facegender.data.sources import archive as archive_module
from facegender.data.sources.archive import ArchiveLimits, DamagedArchive, extract_archive
from facegender.data.sources.fetch import fetch_dataset
from facegender.errors import UserError
from facegender.params import FolderDataset
from tests.conftest import read

LIMITS = ArchiveLimits(max_total_bytes=10**9, max_ratio=100, max_files=10_000)


def limits(**changes: float) -> ArchiveLimits:
    return dataclasses.replace(LIMITS, **changes)


FILES = {"female/a.jpg": os.urandom(3000), "male/b.jpg": os.urandom(3000), "faces.csv": b"file,age"}
KINDS = ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"]


def make_zip(path: Path, files: dict[str, bytes] = FILES, *more: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of duplicate names, which are the point of a test
        for name, content in [*files.items(), *more]:
            zipped.writestr(name, content)
    return path


def make_tar(
    path: Path, files: dict[str, bytes] = FILES, *more: tuple[str, bytes], mode: str = "w"
) -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in [*files.items(), *more]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make(path: Path, kind: str, files: dict[str, bytes] = FILES, *more: tuple[str, bytes]) -> Path:
    path = path / f"faces.{kind}"
    if kind == "zip":
        return make_zip(path, files, *more)
    return make_tar(path, files, *more, mode=f"w:{kind.partition('.')[2]}")


@pytest.fixture
def refused(tmp_path) -> Callable[..., str]:
    """Unpack what must not be unpacked, see that nothing is written, and return the message."""

    def extract(archive: Path, limits: ArchiveLimits | None = None, error: type = UserError) -> str:
        target = tmp_path / "box" / "target"
        before = sorted(path for path in tmp_path.rglob("*") if "box" not in path.parts)
        with pytest.raises(error) as caught:
            extract_archive(archive, target, limits or LIMITS)
        assert list((tmp_path / "box").rglob("*")) == [target]
        assert sorted(path for path in tmp_path.rglob("*") if "box" not in path.parts) == before
        assert archive.name in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return extract


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_unpacked(tmp_path, kind):
    archive = make(tmp_path, kind)
    archive = archive.rename(tmp_path / "no-telling-name")
    extract_archive(archive, tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == FILES


@pytest.mark.parametrize("kind", KINDS)
def test_keep_chooses_what_is_written(tmp_path, kind):
    archive = make(tmp_path, kind)
    extract_archive(
        archive, tmp_path / "target", LIMITS, keep=lambda path, _start: path.suffix == ".csv"
    )
    assert read(tmp_path / "target") == {"faces.csv": FILES["faces.csv"]}


@pytest.mark.parametrize("name", ["more.zip", "table.xlsx"])
def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path, name):
    packed = make_zip(tmp_path / "packed").read_bytes()
    files = FILES | {name: packed}
    extract_archive(make_tar(tmp_path / "faces.tar", files), tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == files


@pytest.mark.parametrize("kind", KINDS)
def test_archives_behind_one_another_are_refused(tmp_path, refused, kind):
    first, second = ({f"{label}/a.jpg": b"a" * 20_000} for label in ("female", "male"))
    packed = make(tmp_path, kind, first).read_bytes()
    joined = make(tmp_path, kind, second)
    joined.write_bytes(packed + joined.read_bytes())
    assert "another archive" in refused(joined)


@pytest.mark.parametrize("first", ["PK/a.jpg", "female/a.jpg"])
def test_a_tar_of_the_format_v7_is_unpacked(tmp_path, first):
    packed = make_tar(tmp_path / "faces.tar", {first: b"a" * 600}).read_bytes()
    v7 = bytearray(packed)
    v7[257:265] = bytes(8)  # no magic and version
    v7[148:156] = b" " * 8
    v7[148:155] = b"%06o\0" % sum(v7[:512])
    (tmp_path / "v7.tar").write_bytes(v7)
    extract_archive(tmp_path / "v7.tar", tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == {first: b"a" * 600}


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../evil.jpg", "leads out"),
        ("female/../../evil.jpg", "leads out"),
        ("female\\..\\..\\evil.jpg", "leads out"),
        ("/tmp/facegender-evil.jpg", "absolute"),
        ("C:\\evil.jpg", "absolute"),
        ("\\\\server\\evil.jpg", "absolute"),
    ],
)
def test_a_name_outside_is_refused(tmp_path, refused, kind, name, reason):
    files = {"female/a.jpg": b"1", name: b"2"}
    message = refused(make(tmp_path, kind, files))
    assert reason in message
    assert repr(name) in message
    assert not Path("/tmp/facegender-evil.jpg").exists()


def test_a_name_with_nul_is_refused(tmp_path, refused):
    archive = make_zip(tmp_path / "faces.zip", {"female/a.jpg#.exe": b"1"})
    archive.write_bytes(archive.read_bytes().replace(b"#", b"\0"))
    assert "no usable name" in refused(archive)


def test_backslashes_separate_folders(tmp_path):
    archive = make_zip(tmp_path / "faces.zip", {"women\\a.jpg": b"1"})
    extract_archive(archive, tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == {"women/a.jpg": b"1"}


@pytest.mark.parametrize(
    ("bytes_of_name", "name"),
    [
        ("Ma\u0308nner/Zoe\u0308 \U0001f642.jpg".encode(), "Ma\u0308nner/Zoe\u0308 \U0001f642.jpg"),
        ("M\u00e4nner/Zo\u00eb.jpg".encode("cp437"), "M\u00e4nner/Zo\u00eb.jpg"),
    ],
    ids=["mac", "windows"],
)
def test_names_of_a_zip_without_the_flag_of_utf_8(tmp_path, bytes_of_name, name):
    """macOS writes UTF-8 without the flag, Windows its own encoding."""
    stand_in = "x" * len(bytes_of_name)
    archive = make_zip(tmp_path / "faces.zip", {stand_in: b"1"})
    archive.write_bytes(archive.read_bytes().replace(stand_in.encode(), bytes_of_name))
    extract_archive(archive, tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == {name: b"1"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("to", ["/etc/passwd", "../outside", "female/a.jpg"])
def test_a_link_in_a_tar_is_refused(tmp_path, refused, kind, to):
    archive = make_tar(tmp_path / "faces.tar")
    with tarfile.open(archive, "a") as tar:
        info = tarfile.TarInfo("male/link.jpg")
        info.type, info.linkname = kind, to
        tar.addfile(info)
    assert "'male/link.jpg': it is a link" in refused(archive)


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"])
def test_a_device_in_a_tar_is_refused(tmp_path, refused, kind):
    archive = make_tar(tmp_path / "faces.tar")
    with tarfile.open(archive, "a") as tar:
        info = tarfile.TarInfo("male/device.jpg")
        info.type = kind
        tar.addfile(info)
    assert "it is a device" in refused(archive)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [(stat.S_IFLNK, "a link"), (stat.S_IFCHR, "a device"), (stat.S_IFIFO, "a device")],
)
def test_a_link_or_device_in_a_zip_is_refused(tmp_path, refused, mode, reason):
    archive = make_zip(tmp_path / "faces.zip")
    with zipfile.ZipFile(archive, "a") as zipped:
        info = zipfile.ZipInfo("male/odd.jpg")
        info.external_attr = (mode | 0o777) << 16
        zipped.writestr(info, "/etc/passwd")
    assert f"it is {reason}" in refused(archive)


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ("female/a.jpg", "occurs twice"),
        ("./female//a.jpg", "occurs twice"),
        ("female", "occurs twice"),
        ("female/a.jpg/b.jpg", "with the name of a file"),
    ],
)
def test_names_that_clash_are_refused(tmp_path, refused, kind, second, reason):
    archive = make(tmp_path, kind, {"female/a.jpg": b"1"}, (second, b"2"))
    assert reason in refused(archive)


def test_a_folder_may_be_listed_twice(tmp_path):
    make_tar(tmp_path / "faces.tar", {"female/a.jpg": b"1"})
    with tarfile.open(tmp_path / "faces.tar", "a") as tar:
        for name in ("./", "female/", "female/"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
    extract_archive(tmp_path / "faces.tar", tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == {"female/a.jpg": b"1"}


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_the_ratio_is_limited(tmp_path, refused, kind):
    archive = make(tmp_path, kind, {"female/a.jpg": b"1", "male/bomb.jpg": bytes(20_000_000)})
    message = refused(archive)
    assert "raise archive.max_ratio" in message
    assert "male/bomb.jpg" in message
    extract_archive(archive, tmp_path / "target", limits(max_ratio=1e6))
    assert len(read(tmp_path / "target")["male/bomb.jpg"]) == 20_000_000


@pytest.mark.parametrize("kind", KINDS)
def test_the_total_is_limited_across_files(tmp_path, refused, kind):
    archive = make(tmp_path, kind)
    total = sum(map(len, FILES.values()))
    assert "raise archive.max_gigabytes" in refused(archive, limits(max_total_bytes=total - 1))
    extract_archive(archive, tmp_path / "target", limits(max_total_bytes=total))
    assert read(tmp_path / "target") == FILES


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_the_number_of_files_is_limited(tmp_path, refused, kind):
    archive = make(tmp_path, kind)
    assert "raise archive.max_files" in refused(archive, limits(max_files=2))
    extract_archive(archive, tmp_path / "target", limits(max_files=3))


def test_limits_count_what_is_not_kept(tmp_path):
    archive = make_zip(tmp_path / "faces.zip")
    with pytest.raises(UserError, match="max_files"):
        extract_archive(
            archive, tmp_path / "target", limits(max_files=2), keep=lambda _, _start: False
        )


def test_a_zip_that_lies_about_a_size_writes_no_more_than_that(tmp_path, refused):
    archive = make_zip(tmp_path / "faces.zip", {"female/a.jpg": bytes(5_000_000)})
    size = (5_000_000).to_bytes(4, "little")
    lie = (1000).to_bytes(4, "little")
    archive.write_bytes(archive.read_bytes().replace(size, lie))
    assert "CRC" in refused(archive, error=DamagedArchive)


def test_a_huge_header_of_a_tar_is_not_read_into_memory(tmp_path, refused):
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 10**10
    with lzma.open(tmp_path / "faces.tar.xz", "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.write(bytes(1 << 20))
    assert "a header says it has 10,000,000,000 bytes" in refused(tmp_path / "faces.tar.xz")


def test_what_follows_the_end_of_a_tar_is_limited(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(archive_module, "_MAX_HEADER_BYTES", 1 << 20)
    plain = make_tar(tmp_path / "faces.tar").read_bytes()
    (tmp_path / "faces.tar.bz2").write_bytes(bz2.compress(plain + bytes(10_000_000)))
    assert "max_ratio" in refused(tmp_path / "faces.tar.bz2")


@pytest.mark.parametrize("flag", [0x1, 0x40, 0x2000])
def test_an_encrypted_member_is_refused(tmp_path, refused, flag):
    archive = make_zip(tmp_path / "faces.zip")
    content = bytearray(archive.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 8 : directory + 10] = flag.to_bytes(2, "little")
    archive.write_bytes(content)
    assert "'female/a.jpg': it is encrypted" in refused(archive)


def test_an_unknown_compression_is_refused(tmp_path, refused):
    archive = make_zip(tmp_path / "faces.zip")
    content = bytearray(archive.read_bytes())
    for mark, offset in ((b"PK\x01\x02", 10), (b"PK\x03\x04", 8)):
        place = content.index(mark) + offset
        content[place : place + 2] = (9).to_bytes(2, "little")  # deflate64
    archive.write_bytes(content)
    assert "its compression is not supported" in refused(archive)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.85])
def test_a_truncated_archive_is_damaged(tmp_path, refused, kind, part):
    # The last eighth of the tar is padding, which is no loss.
    archive = make(tmp_path, kind, {f"female/{n}.jpg": os.urandom(3000) for n in range(20)})
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * part)])
    assert "damaged" in refused(archive, error=DamagedArchive)


@pytest.mark.parametrize("cut", [512 + 1024, 512 + 1024 + 100, 512 + 1000])
def test_a_tar_cut_at_or_in_a_header_is_damaged(tmp_path, refused, cut):
    archive = make_tar(tmp_path / "faces.tar", {"female/a.jpg": bytes(1024), "male/b.jpg": b"1"})
    archive.write_bytes(archive.read_bytes()[:cut])
    assert "damaged" in refused(archive, error=DamagedArchive)


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_a_flipped_bit_is_damage(tmp_path, refused, kind):
    archive = make(tmp_path, kind, {"female/a.jpg": os.urandom(50_000)})
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.write_bytes(content)
    refused(archive, error=DamagedArchive)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("faces.zip", b"", "empty"),
        ("faces.zip", b"<html>Sign in</html>", "not those of an archive"),
        ("faces.jpg", b"\xff\xd8\xff\xe0 a photo" * 99, "not an archive of a known kind"),
    ],
)
def test_what_is_no_archive_is_refused(tmp_path, refused, name, content, reason):
    (tmp_path / name).write_bytes(content)
    assert reason in refused(tmp_path / name)


def test_a_file_in_the_way_is_kept(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.jpg").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        extract_archive(make_zip(tmp_path / "faces.zip"), target, LIMITS)
    assert read(target) == {"mine.jpg": b"mine"}


def test_a_name_that_the_disk_cannot_take_is_an_error(tmp_path, refused):
    assert "cannot be unpacked" in refused(
        make_zip(tmp_path / "faces.zip", {"female/" + "a" * 300 + ".jpg": b"1"})
    )


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_wrong_crc_is_damage(tmp_path, refused, method):
    with zipfile.ZipFile(tmp_path / "faces.zip", "w", method) as zipped:
        zipped.writestr("female/a.jpg", b"soft curls" * 50)
    content = bytearray((tmp_path / "faces.zip").read_bytes())
    for mark, offset in ((b"PK\x01\x02", 16), (b"PK\x03\x04", 14)):
        content[content.index(mark) + offset] ^= 1
    (tmp_path / "faces.zip").write_bytes(content)
    assert "CRC" in refused(tmp_path / "faces.zip", error=DamagedArchive)


def test_members_that_share_their_bytes_are_refused(tmp_path, refused):
    """The bomb of David Fifield ("A better zip bomb", WOOT 2019) is made of such members."""
    archive = make_zip(tmp_path / "faces.zip", {"male/0.jpg": bytes(1000), "male/1.jpg": b"1"})
    content = bytearray(archive.read_bytes())
    second = content.rindex(b"PK\x01\x02")
    content[second + 42 : second + 46] = (0).to_bytes(4, "little")  # both begin at the start
    archive.write_bytes(content)
    refused(archive, error=DamagedArchive)


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_in_an_archive_stays_packed(tmp_path, kind):
    """So one that holds itself, or bombs in bombs, has no next level."""
    (tmp_path / "inner").mkdir()
    bomb = make(tmp_path / "inner", "tar.gz", {"a.jpg": bytes(10**7)}).read_bytes()
    archive = make(tmp_path, kind, {"female/a.zip": bomb, "female/b.jpg": b"1"})
    extract_archive(archive, tmp_path / "target", LIMITS)
    assert read(tmp_path / "target") == {"female/a.zip": bomb, "female/b.jpg": b"1"}


def test_a_sparse_member_counts_by_what_it_unpacks_to(tmp_path, refused):
    info = tarfile.TarInfo("male/sparse.jpg")
    info.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.name": "male/sparse.jpg",
        "GNU.sparse.size": str(10**12),
        "GNU.sparse.numblocks": "0",
        "GNU.sparse.map": "",
    }
    with tarfile.open(tmp_path / "faces.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    refused(tmp_path / "faces.tar")


@pytest.mark.parametrize("name", ["../evil.jpg", "male/" + "b" * 300 + ".jpg"])
def test_what_is_refused_leaves_the_raw_data_as_they_were(tmp_path, name):
    raw = tmp_path / "data" / "raw"
    raw.mkdir(parents=True)
    (raw / "old.jpg").write_bytes(b"old")
    archive = make_zip(tmp_path / "faces.zip", {"female/a.jpg": b"1", name: b"2"})
    dataset = FolderDataset.model_validate(
        {"source": "folder", "input": "x", "path": str(archive), "labels": {"kind": "folders"}}
    )
    with pytest.raises(UserError, match=r"faces\.zip"):
        fetch_dataset(dataset, raw, limits=LIMITS, cache=tmp_path / "cache", root=tmp_path)
    assert read(tmp_path / "data") == {"raw/old.jpg": b"old"}
    assert not Path(tmp_path / "evil.jpg").exists()
