"""The directory of raw data: made aside and renamed, so that it is never half-filled."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from facegender.manifest import file_sha256


def content_digest(directory: Path) -> tuple[int, str]:
    """Return the number of files under a directory and one SHA-256 of their names and contents."""
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


@contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the place of `target` if the body succeeds.

    It lies beside `target`, on the same filesystem, so that the change is a rename. If the body
    raises, `target` stays as it was; what a killed run left aside is cleared by the next.
    """
    aside = target.with_name(f".{target.name}.partial")
    former = target.with_name(f".{target.name}.former")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        shutil.rmtree(former, ignore_errors=True)
        if target.exists():
            target.rename(former)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(former, ignore_errors=True)
