"""Unpacks untrusted archives: zip, tar, tar.gz, tar.bz2 and tar.xz.

Every archive, from Kaggle or from disk, goes through `extract_archive`. It reads each member itself
instead of calling `extractall`, and refuses the whole archive, with the reason, at the first member
that is not a plain file or folder inside the target.
"""

import bz2
import gzip
import io
import lzma
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Self, cast

from facegender.data.sources.raw_directory import emptied_on_error, storable_path
from facegender.errors import UserError

if TYPE_CHECKING:
    from facegender.params import Archive

_CHUNK = 1 << 20
# tarfile reads extended headers of a tar member, such as long names, in one go. They have a few
# hundred bytes, and the padding at the end a few thousand.
_MAX_HEADER_BYTES = 1 << 24
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # flags of a zip member: password, strong, hidden names
_UTF8 = 0x800  # flag of a zip member: without it, zipfile decodes the name as cp437
# Exceptions that the standard library raises for damaged archives.
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    IndexError,
    OverflowError,
)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")  # gzip, bzip2, xz
_SUFFIXES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz"}
_JOINED = ("another archive is joined to it", "Unpack both, and name the folder.")
_REPACK = "Pack the images again without it, or ask the author of the archive."


@dataclass(frozen=True)
class ArchiveLimits:
    """Limits on an archive or folder.

    JPEG and PNG are compressed already, so their archives have a ratio near 1. Bitmaps and tables
    may reach 20; a zip bomb has 1000 and more.

    Attributes:
        max_total_bytes: total size of all files, unpacked.
        max_ratio: unpacked bytes for each byte of the archive.
        max_files: number of files and folders.
    """

    max_total_bytes: int
    max_ratio: float
    max_files: int

    @classmethod
    def from_params(cls, archive: "Archive") -> Self:
        """Return the limits that the parameters set."""
        return cls(int(archive.max_gigabytes * 10**9), archive.max_ratio, archive.max_files)


class DamagedArchive(UserError):
    """The archive is cut off, or its checksums do not match."""


class _RefusedError(Exception):
    """Reason why an archive is refused."""

    def __init__(self, reason: str, advice: str = _REPACK) -> None:
        super().__init__(reason)
        self.advice = advice


class _DamagedError(Exception):
    """Damage of an archive."""


@dataclass(frozen=True)
class _Member:
    name: str
    kind: str  # "file", "folder", or another word for "it is ..."
    size: int  # bytes, unpacked, as the archive declares them
    open: Callable[[], IO[bytes] | None]


def extract_archive(
    archive: Path,
    target: Path,
    limits: ArchiveLimits,
    *,
    keep: Callable[[PurePosixPath, bytes], bool] = lambda _path, _start: True,
) -> None:
    """Unpack the files of `archive` into the empty directory `target`, or leave it empty.

    Links, devices, encrypted members, duplicate names, names that lead out of the target, and more
    than `limits` allow are refused. Owners, permissions and dates are not restored.

    Args:
        archive: file to unpack; its first bytes decide its kind.
        target: empty directory, created if missing.
        keep: whether to write a file, given its path and first 512 bytes; all are checked.

    Raises:
        DamagedArchive: the archive is truncated or corrupt.
        UserError: the archive is refused or cannot be read, or the target cannot be written. Names
            the archive, the member and the reason.
        ValueError: the target is not empty.
    """
    where = ""
    with emptied_on_error(target):
        try:
            guard = _Guard(limits, archive.stat().st_size)
            members = _open_zip(archive) if _is_zip(archive) else _open_tar(archive, guard)
            with closing(members):
                for member in members:
                    where = f", at {member.name[:200]!r}"
                    path = guard.admit(member)
                    if member.kind == "file":
                        _write(member, target / path, partial(keep, path))
                    where = ""
        except _RefusedError as refused:
            raise UserError(
                f"{archive.name} is refused{where}: {refused}. {refused.advice}"
            ) from refused
        except RuntimeError as error:  # an unknown method or version, in zipfile
            raise UserError(
                f"{archive.name} is refused{where}: its compression is not supported ({error}). "
                "Pack the images again."
            ) from error
        except (_DamagedError, *_DAMAGE) as error:
            raise DamagedArchive(_damage(archive, where, error)) from error
        except OSError as error:
            if error.errno is None:  # bad data, in bz2 and gzip
                raise DamagedArchive(_damage(archive, where, error)) from error
            raise UserError(
                f"{archive.name} cannot be unpacked{where}: {error.strerror}. Check that it can be "
                "read and that the disk has room."
            ) from error


def _damage(archive: Path, where: str, error: Exception) -> str:
    return (
        f"{archive.name} is damaged{where}: {error}. The file is incomplete or corrupt: "
        "download it again."
    )


@dataclass
class _Guard:
    """Decides on each member in turn, given all earlier ones."""

    limits: ArchiveLimits
    packed_bytes: int
    count: int = 0
    total_bytes: int = 0
    files: set[PurePosixPath] = field(default_factory=set)
    folders: set[PurePosixPath] = field(default_factory=set)

    def admit(self, member: _Member) -> PurePosixPath:
        """Return the path of the member inside the target. Raises _RefusedError."""
        path = _safe_path(member.name)
        if member.kind not in {"file", "folder"}:
            raise _RefusedError(f"it is {member.kind}")
        self.count += 1
        if self.count > self.limits.max_files:
            raise _RefusedError(
                f"the archive has more than {self.limits.max_files:,} files",
                "If you trust it, raise archive.max_files.",
            )
        if path in self.files or (member.kind == "file" and path in self.folders):
            raise _RefusedError("this name occurs twice")
        if not self.files.isdisjoint(path.parents):
            raise _RefusedError("it lies in a folder with the name of a file")
        self.folders.update(path.parents)
        if member.kind == "folder":
            self.folders.add(path)
        else:
            self.files.add(path)
            self.total_bytes += member.size
            self.check_size(self.total_bytes)
        return path

    def check_size(self, unpacked_bytes: int, *, spare: int = 0) -> None:
        """Raise _RefusedError for more bytes than the limits, plus `spare`, allow."""
        for name, most in (
            ("archive.max_gigabytes", self.limits.max_total_bytes),
            ("archive.max_ratio", int(self.limits.max_ratio * self.packed_bytes)),
        ):
            if unpacked_bytes > most + spare:
                raise _RefusedError(
                    f"the archive's {self.packed_bytes:,} bytes unpack to more than {most:,}",
                    f"Zip bombs do that. If you trust the archive, raise {name}.",
                )


def _safe_path(name: str) -> PurePosixPath:
    # Some archives made on Windows separate folders with backslashes.
    posix = name.replace("\\", "/")
    path = PurePosixPath(posix)
    if posix.startswith("/") or re.match("[A-Za-z]:", posix):
        raise _RefusedError("its name is an absolute path")
    if ".." in path.parts:
        raise _RefusedError("its name leads out of the folder")
    if "\0" in name or not name:
        raise _RefusedError("it has no usable name")
    return storable_path(path)


def _write(member: _Member, path: Path, keep: Callable[[bytes], bool]) -> None:
    source = member.open()
    if source is None:
        raise _DamagedError("it has no content")
    with source:
        chunk = source.read(tarfile.BLOCKSIZE)
        if not keep(chunk):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            written = file.write(chunk)
            while chunk := source.read(_CHUNK):
                written += file.write(chunk)
    if written != member.size:
        raise _DamagedError(f"{written:,} of its {member.size:,} bytes are there")


def _is_zip(archive: Path) -> bool:
    start = _start(archive)
    if not start:
        raise _DamagedError("it is empty")
    # A tar may end with a zip; a zip may begin with a program that unpacks it.
    return not _is_tar(start) and (start.startswith(b"PK") or zipfile.is_zipfile(archive))


def _start(archive: Path) -> bytes:
    with archive.open("rb") as file:
        return file.read(tarfile.BLOCKSIZE)


def _is_tar(start: bytes) -> bool:
    """Return whether a file is compressed or a tar, even of the old format v7."""
    if start.startswith(_COMPRESSED) or start[257:262] == b"ustar":
        return True
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _open_zip(archive: Path) -> Generator[_Member, None, None]:
    with zipfile.ZipFile(archive) as zipped:
        infos = zipped.infolist()
        # A program that unpacks a zip may be before it, but not a zip, as after `cat a.zip b.zip`.
        if all(info.header_offset for info in infos) and _start(archive).startswith(b"PK\3\4"):
            raise _RefusedError(*_JOINED)
        for info in infos:
            open_member = partial(zipped.open, info)
            yield _Member(_zip_name(info), _zip_kind(info), info.file_size, open_member)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Return a member's name; macOS writes UTF-8 without its flag."""
    # zipfile cuts `filename` at a NUL; from Python 3.12 on it may hold a name in Unicode.
    name = info.orig_filename if "\0" in info.orig_filename else info.filename
    if not info.flag_bits & _UTF8:
        with suppress(UnicodeError):
            return name.encode("cp437").decode("utf-8")
    return name


def _zip_kind(info: zipfile.ZipInfo) -> str:
    if info.flag_bits & _ENCRYPTED:
        return "encrypted"
    mode = stat.S_IFMT(info.external_attr >> 16)
    if mode == stat.S_IFLNK:
        return "a link"
    if mode not in {0, stat.S_IFREG, stat.S_IFDIR}:
        return "a device"
    folder = mode == stat.S_IFDIR or info.filename.endswith(("/", "\\"))
    return "folder" if folder else "file"


def _open_tar(archive: Path, guard: _Guard) -> Generator[_Member, None, None]:
    with _decompress(archive) as plain:
        stream = _Stream(plain, guard)
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as tar:
            while (info := tar.next()) is not None:
                yield _Member(info.name, _tar_kind(info), info.size, partial(tar.extractfile, info))
                tar.members = []  # type: ignore[attr-defined]  # it would hold all of them
            # tarfile treats an archive that ends in, or just before, a header as complete.
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise _DamagedError("its end is missing")
        while chunk := stream.read(_CHUNK):  # to the checksum at the end of the compressed data
            if _is_tar(chunk.lstrip(b"\0")[: tarfile.BLOCKSIZE]):
                raise _RefusedError(*_JOINED)


def _tar_kind(info: tarfile.TarInfo) -> str:
    if info.isreg():
        return "file"
    if info.isdir():
        return "folder"
    return "a link" if info.issym() or info.islnk() else "a device"


def _decompress(archive: Path) -> IO[bytes]:
    start = _start(archive)
    if start.startswith(_COMPRESSED[0]):
        return cast(IO[bytes], gzip.open(archive))
    if start.startswith(_COMPRESSED[1]):
        return cast(IO[bytes], bz2.open(archive))
    if start.startswith(_COMPRESSED[2]):
        return cast(IO[bytes], lzma.open(archive))
    if not _is_tar(start):
        if archive.suffix.lower() in _SUFFIXES:
            raise _DamagedError("its bytes are not those of an archive")
        raise _RefusedError(
            "it is not an archive of a known kind",
            "Name a folder of images, or pack them as .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz.",
        )
    return archive.open("rb")


class _Stream(io.RawIOBase):
    """The uncompressed tar, limited in its total size and in the size of each read."""

    def __init__(self, plain: IO[bytes], guard: _Guard) -> None:
        self._plain = plain
        self._guard = guard

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise _RefusedError(f"a header says it has {size:,} bytes")
        self._guard.check_size(self._plain.tell(), spare=_MAX_HEADER_BYTES)
        return self._plain.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._guard.check_size(offset, spare=_MAX_HEADER_BYTES)
        return self._plain.seek(offset, whence)

    def tell(self) -> int:
        return self._plain.tell()
