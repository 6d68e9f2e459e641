"""The directory of raw data: its digest, and how it is put in place whole or not at all."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from facegender.files import file_sha256


def content_digest(directory: Path) -> tuple[int, str]:
    """Return the number of files under `directory` and one SHA-256 for all of them.

    The digest covers each file's path (POSIX, relative) and bytes and nothing else, so dates,
    permissions and empty folders make no difference. Symbolic links are left out.
    """
    digest = hashlib.sha256()
    paths = sorted(
        (path.relative_to(directory).as_posix(), path)
        for path in directory.rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    for name, path in paths:
        # A length before each name: no two sets of names run into the same bytes.
        digest.update(f"{len(os.fsencode(name))}:".encode() + os.fsencode(name))
        digest.update(file_sha256(path).encode())
    return len(paths), digest.hexdigest()


def storable_path(path: PurePosixPath) -> PurePosixPath:
    r"""Return a path with what is not UTF-8 spelt out, as in `ren\xe9.jpg`, and `\r`, too.

    Old disks and archives have such names. DVC cannot hold the former; most readers of CSV take
    the latter for the end of a row.
    """
    text = os.fsencode(path).decode(errors="backslashreplace")
    return PurePosixPath(text.replace("\r", r"\r"))


def clear_directory(directory: Path) -> None:
    """Remove everything in `directory`, and leave it empty."""
    for path in directory.iterdir():
        _remove(path)


@contextmanager
def emptied_on_error(directory: Path) -> Iterator[None]:
    """Make `directory` if need be, and leave nothing in it when the body raises.

    Raises:
        ValueError: something lies in the directory already, which this would remove.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty")
    try:
        yield
    except BaseException:
        clear_directory(directory)
        raise


@contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory that replaces `target` when the body succeeds.

    It lies beside `target`, on the same filesystem, so that the change is a rename. If the body
    raises anything, Ctrl-C included, `target` stays as it was; the next call clears what a killed
    one left. Under DVC `target` does not exist: DVC removes a stage's outputs before it runs.
    """
    temporary = target.with_name(f".{target.name}.partial")
    _remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _remove(target)
        temporary.rename(target)
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: Path) -> None:
    # A link is removed as a link: what it leads to belongs to somebody else.
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
