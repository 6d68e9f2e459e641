"""Which files are images, by their endings."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

IMAGE_SUFFIXES = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg"),
        *(".png", ".tif", ".tiff", ".webp"),
    }
)


def find_images(directory: Path) -> list[PurePosixPath]:
    """Return the image files under `directory`, relative to it, sorted by name.

    Hidden files and the litter of operating systems (`__MACOSX`) are passed over.
    """
    return sorted(walk_images(directory), key=str)


def walk_images(directory: Path) -> Iterator[PurePosixPath]:
    """Yield what `find_images` returns, folder by folder, without holding all of it."""
    for folder, folders, names in os.walk(directory):
        folders.sort()
        below = PurePosixPath(Path(folder).relative_to(directory).as_posix())
        for name in sorted(names):
            if is_photo(below / name) and Path(folder, name).is_file():
                yield below / name


def is_photo(relative: PurePosixPath) -> bool:
    """Return whether a path below a folder names a photo, by its suffix; no litter is one."""
    litter = any(part.startswith(".") or part == "__MACOSX" for part in relative.parts)
    return not litter and relative.suffix.lower() in IMAGE_SUFFIXES
