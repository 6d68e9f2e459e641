"""Unpacking of archives that nobody vouches for: zip, tar, tar.gz, tar.bz2 and tar.xz.

Every archive, whether from Kaggle or from disk, goes through `extract_archive`. It reads each
member itself instead of calling `extractall`, and refuses the whole archive, with the reason, at
the first member that is not a plain file or folder inside the target.
"""

import bz2
import gzip
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from facegender.datasets.raw import emptied_on_error
from facegender.errors import UserError

_CHUNK = 1 << 20
# tarfile reads a member's extended header (a long name, PAX records) into memory in one go.
# Real ones have a few hundred bytes.
_MAX_HEADER_BYTES = 1 << 24
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
)


@dataclass(frozen=True)
class ArchiveLimits:
    """What an archive may unpack to.

    The defaults let any face dataset through (CelebA, one of the largest, has 200,000 files and
    10 GB as PNG) and stop what would fill a disk. JPEG and PNG are compressed already, so
    their archives have a ratio near 1, raw bitmaps and tables perhaps 20; a zip bomb has 1000
    and more.

    Attributes:
        max_total_bytes: of all files together, unpacked.
        max_ratio: unpacked bytes for each byte of the archive.
        max_files: files and folders.
    """

    max_total_bytes: int = 100 * 10**9
    max_ratio: float = 100.0
    max_files: int = 2_000_000


class DamagedArchive(UserError):
    """The archive is cut off or its bytes are not what its checksums say."""


class _Refused(Exception):
    """Why a member, or the archive, is not unpacked."""


class _Damaged(Exception):
    """What is broken about the archive."""


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...


def extract_archive(
    archive: Path,
    target: Path,
    limits: ArchiveLimits,
    *,
    keep: Callable[[PurePosixPath], bool] = lambda _: True,
) -> None:
    """Unpack `archive` into the empty directory `target`; on any failure it is empty again.

    Links, devices, encrypted members, names that leave the target or appear twice, and whatever
    exceeds `limits` are refused. Owners, permissions and dates are not restored.

    Args:
        archive: the file to unpack; its kind is known by its first bytes.
        target: an empty directory, made if it is missing.
        limits: what it may unpack to.
        keep: which files to write; the others are checked and passed over.

    Raises:
        DamagedArchive: the archive is truncated or corrupt.
        UserError: the archive cannot be read or is refused; names the archive, the member and
            the reason.
        ValueError: the target is not empty.
    """
    member = ""
    guard = _Guard(limits, packed_bytes=0)

    def write(name: str, size: int, source: Callable[[], IO[bytes]], path: PurePosixPath) -> None:
        nonlocal member
        member = name
        if keep(path):
            _write(source, target / path, size)

    def admit(name: str, size: int, kind: str) -> PurePosixPath:
        nonlocal member
        member = name
        return guard.admit(name, size, kind)

    with emptied_on_error(target):
        try:
            guard.packed_bytes = archive.stat().st_size
            if _is_zip(archive):
                _extract_zip(archive, target, admit, write)
            else:
                _extract_tar(archive, target, admit, write)
        except Exception:
            raise
