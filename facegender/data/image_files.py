"""Which files are images: by their endings or, where these are unknown, by their first bytes."""

import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

_log = logging.getLogger(__name__)
IMAGE_SUFFIXES = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm"),
        *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
    }
)
# First bytes of images whose ending is unknown or missing. TIFF's are also those of raw photos.
_IMAGE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF.{4}WEBP|P[1-6]\s(?:\s|#[^\n]*\n)*\d+\s|BM.{4}\0{4}|"
    rb".{4}ftyp(avif|heic|heix|mif1|msf1)",
    re.DOTALL,
)
_ARCHIVE = re.compile(rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ\0|7z\xbc\xaf|Rar!|.{257}ustar", re.DOTALL)
START_BYTES = 512
_NAMED = 5


@dataclass
class PassedOver:
    """Number and first names of what a search passes over: other files and links to folders."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, path: PurePosixPath) -> None:
        """Count one."""
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(str(path))

    def text(self, folder: str) -> str:
        """Return a line for the user, or an empty string if nothing was passed over."""
        if not self.count:
            return ""
        names = ", ".join(map(repr, self.first)) + (", ..." if self.count > _NAMED else "")
        return f"skipped {self.count:,} in {folder}, not image files: {names}"


def find_images(
    directory: Path,
    unreadable: Callable[[OSError], None] | None = None,
    passed_over: PassedOver | None = None,
) -> list[PurePosixPath]:
    """Return the image files under `directory`, relative to it, sorted by name.

    Hidden files and the litter of operating systems (`__MACOSX`) are passed over.

    Args:
        unreadable: called with the error of each folder that cannot be listed; None logs it.
        passed_over: counts other files, except hidden ones, and links to folders, which are not
            followed.
    """
    return sorted(walk_images(directory, unreadable, passed_over), key=str)


def walk_images(
    directory: Path,
    unreadable: Callable[[OSError], None] | None = None,
    passed_over: PassedOver | None = None,
) -> Iterator[PurePosixPath]:
    """Yield what `find_images` returns, folder by folder, without holding it all in memory."""
    for folder, folders, names in os.walk(directory, onerror=unreadable or _log_unreadable):
        # Not into hidden folders: other users' trash on a disk, for example, cannot be listed.
        folders[:] = sorted(name for name in folders if not is_litter(PurePosixPath(name)))
        below = PurePosixPath(Path(folder).relative_to(directory).as_posix())
        links = [name for name in folders if passed_over and Path(folder, name).is_symlink()]
        for name in sorted(names) + links:
            path = Path(folder, name)
            if is_litter(below / name):
                continue
            if _is_file(path) and (
                is_photo(below / name)
                or (path.suffix.lower() != ".csv" and looks_like_image(read_start(path)))
            ):
                yield below / name
            elif passed_over:
                passed_over.add(below / name)


def _is_file(path: Path) -> bool:
    """Return whether a path is or may be a file; the decoder reports why it cannot be read."""
    try:
        return path.is_file()
    except PermissionError:
        return True


def find_tables(directory: Path, pattern: str = "*") -> list[Path]:
    """Return the CSV files under `directory` whose names fit a pattern of * and ?, in any case."""
    pattern = pattern.lower().replace("[", "[[]")
    return sorted(
        path
        for path in directory.rglob("*")
        if fnmatchcase(path.name.lower(), pattern)
        and path.suffix.lower() == ".csv"
        and path.is_file()
        and not is_litter(PurePosixPath(path.relative_to(directory)))
    )


def _log_unreadable(error: OSError) -> None:
    _log.warning("The folder %r cannot be read and is left out: %s", error.filename, error.strerror)


def is_photo(relative: PurePosixPath) -> bool:
    """Return whether a relative path has a photo's suffix and is not litter."""
    return not is_litter(relative) and relative.suffix.lower() in IMAGE_SUFFIXES


def is_litter(relative: PurePosixPath) -> bool:
    """Return whether a relative path is hidden or a by-product of an operating system."""
    return any(
        part.startswith(".") or part in {"__MACOSX", "Thumbs.db", "desktop.ini"}
        for part in relative.parts
    )


def looks_like_image(start: bytes) -> bool:
    """Return whether a file begins as an image does."""
    return _IMAGE.match(start) is not None


def looks_like_archive(start: bytes) -> bool:
    """Return whether a file begins as an archive does, given its first 512 bytes."""
    return _ARCHIVE.match(start) is not None


def read_start(path: Path) -> bytes:
    """Return the first 512 bytes of a file; none if permission is denied."""
    try:
        with path.open("rb") as file:
            return file.read(START_BYTES)
    except PermissionError:
        return b""
