"""Which files are images, by their endings or their first bytes."""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from facegender.errors import UserError

IMAGE_SUFFIXES = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm"),
        *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
    }
)
_ARCHIVE_SUFFIXES = frozenset({".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip"})
_LITTER = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})
# How files of the formats that are decoded begin.
_IMAGE_START = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|"
    rb"RIFF.{4}WEBP|II\*\0|MM\0\*|P[1-6][\s#]|.{4}ftyp(avif|heic|heix|mif1|msf1)",
    re.DOTALL,
)

Kind = Literal["image", "table", "archive", "litter", "other"]


def find_images(directory: Path) -> list[PurePosixPath]:
    """Return the image files under `directory`, relative to it, sorted by name.

    Hidden files and the litter of operating systems (`__MACOSX`) are passed over.

    Raises:
        UserError: a folder below cannot be read.
    """
    return sorted(walk_images(directory), key=str)


def walk_images(directory: Path) -> Iterator[PurePosixPath]:
    """Yield what `find_images` returns, folder by folder, without holding all of it."""
    for folder, folders, names in os.walk(directory, onerror=_refuse):
        folders.sort()
        below = PurePosixPath(Path(folder).relative_to(directory).as_posix())
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file() and kind_of_file(below / name, path) == "image":
                yield below / name


def _refuse(error: OSError) -> None:
    raise UserError(
        f"Cannot read the folder {error.filename!r}: {error.strerror}. Make it readable, or move "
        "it elsewhere."
    ) from error


def kind_of_file(relative: PurePosixPath, path: Path) -> Kind:
    """Return what a file holds: by its name or, if that says nothing, by its first bytes.

    Args:
        relative: its path below the folder of the data.
        path: the file, which is read only if its ending is not known.
    """
    if any(part.startswith(".") or part in _LITTER for part in relative.parts):
        return "litter"
    suffix = relative.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix == ".csv":
        return "table"
    if suffix in _ARCHIVE_SUFFIXES:
        return "archive"
    with path.open("rb") as file:
        return "image" if _IMAGE_START.match(file.read(32)) else "other"


def is_photo(relative: PurePosixPath) -> bool:
    """Return whether a name alone says that a file below a folder is a photo."""
    litter = any(part.startswith(".") or part in _LITTER for part in relative.parts)
    return not litter and relative.suffix.lower() in IMAGE_SUFFIXES
