"""The directory of raw data: its digest, and its replacement as a whole or not at all."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from facegender.files import file_sha256


def content_digest(directory: Path) -> tuple[int, str]:
    """Return the number of files under `directory` and one SHA-256 for all of them.

    The digest covers only the path (POSIX, relative) and bytes of each file, so dates, permissions
    and empty folders make no difference. Symbolic links are left out.
    """
    digest = hashlib.sha256()
    paths = sorted(
        (path.relative_to(directory).as_posix(), path)
        for path in directory.rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    for name, path in paths:
        # With its length before each name, different sets of names cannot give the same bytes.
        digest.update(f"{len(os.fsencode(name))}:".encode() + os.fsencode(name))
        digest.update(file_sha256(path).encode())
    return len(paths), digest.hexdigest()


def storable_path(path: PurePosixPath) -> PurePosixPath:
    r"""Return a path in which bytes that are not UTF-8 are escaped, as in `ren\xe9.jpg`, and `\r`.

    Old disks and archives have such names. DVC cannot store the former; most readers of CSV take
    the latter for the end of a row.
    """
    text = os.fsencode(path).decode(errors="backslashreplace")
    return PurePosixPath(text.replace("\r", r"\r"))


def clear_directory(directory: Path) -> None:
    """Remove everything in `directory`, but not the directory."""
    for path in directory.iterdir():
        _remove(path)


@contextmanager
def emptied_on_error(directory: Path) -> Iterator[None]:
    """Create `directory` if it is missing, and empty it if the body raises.

    Raises:
        ValueError: the directory is not empty, so that this would remove something else.
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
    """Yield an empty directory that replaces `target` if the body succeeds.

    It lies next to `target`, on the same filesystem, so that the replacement is a rename. If the
    body raises anything, even by Ctrl-C, `target` does not change. The next call removes what a
    killed one left. Under DVC `target` does not exist: DVC removes outputs before a stage runs.
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
    # Of a link, only the link is removed: its target belongs to somebody else.
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
