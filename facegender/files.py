"""Files on disk: which of them are images, and their digests."""

import hashlib
from pathlib import Path, PurePosixPath

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)

# Photos that people have and that are not decoded. They count as images, so that each is named.
UNSUPPORTED_SUFFIXES = frozenset({".avif", ".heic", ".heif"})
PHOTO_SUFFIXES = IMAGE_SUFFIXES | UNSUPPORTED_SUFFIXES


def find_images(directory: Path) -> list[PurePosixPath]:
    """Return the image files under `directory`, relative to it, sorted by name.

    Hidden files and the litter of operating systems (`__MACOSX`) are passed over.
    """
    found = []
    for path in directory.rglob("*"):
        relative = PurePosixPath(path.relative_to(directory).as_posix())
        litter = any(part.startswith(".") or part == "__MACOSX" for part in relative.parts)
        if not litter and relative.suffix.lower() in PHOTO_SUFFIXES and path.is_file():
            found.append(relative)
    return sorted(found, key=str)


def write_whole(path: Path, text: str) -> None:
    """Replace a text file by a rename, so that it is never seen, or left, half-written."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
