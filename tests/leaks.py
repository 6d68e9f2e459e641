"""Looks into every file under a folder, as far down as it goes: archives and git's objects too."""

import io
import pickletools
import subprocess
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

_PICKLE_SUFFIXES = {".pkl", ".pickle", ".joblib", ".cloudpickle", ".dill"}


def contents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of each file, member of a zip archive, and git object."""
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            yield path.relative_to(root).as_posix(), str(path.readlink()).encode()
        elif path.is_file():
            yield from _unpacked(path.relative_to(root).as_posix(), path.read_bytes())
        elif path.name == ".git":
            objects = subprocess.run(
                ["git", "cat-file", "--batch-all-objects", "--batch"],
                cwd=path.parent,
                capture_output=True,
                check=True,
            ).stdout
            yield f"{path.relative_to(root).as_posix()} objects", objects


def _unpacked(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    yield name, content
    if content.startswith(b"PK") and zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                yield from _unpacked(f"{name}/{member}", archive.read(member))


def holding(root: Path, words: Sequence[str]) -> list[str]:
    """Return the names of what holds one of the words, in its name or its bytes."""
    encoded = [word.encode() for word in words]
    return [
        name
        for name, content in contents(root)
        if any(word in content or word in name.encode() for word in encoded)
    ]


def is_pickle(name: str, content: bytes) -> bool:
    """Say whether a file is a pickle, or a NumPy array that holds one."""
    if PurePosixPath(name).suffix in _PICKLE_SUFFIXES:
        return True
    if content.startswith(b"\x93NUMPY"):
        file = io.BytesIO(content[:4096])
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        return read(file)[2].hasobject
    # Protocols 2 to 5 begin so; older ones are text, and no text here begins like one.
    if content[:1] != b"\x80" or content[1:2] not in {b"\2", b"\3", b"\4", b"\5"}:
        return False
    try:
        return any(code.name == "STOP" for code, _, _ in pickletools.genops(content))
    except ValueError:
        return False
