"""The images that `data.exclude` leaves out."""

import logging
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from facegender.data.labelling_notes import Notes
from facegender.errors import UserError, listed
from facegender.files import file_sha256

_DIGEST = re.compile("[0-9a-f]{64}", re.IGNORECASE)
_log = logging.getLogger(__name__)


def read_exclusions(source: Path) -> list[str]:
    """Return the entries of a list. Raises UserError if it cannot be read."""
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read {source}, which data.exclude names: {error}. Each line holds a path "
            "relative to data/raw, or a SHA-256."
        ) from error
    return [entry for line in lines if (entry := line.strip()) and not entry.startswith("#")]


def exclude_images(
    images: Sequence[PurePosixPath], directory: Path, entries: Sequence[str], notes: Notes
) -> dict[str, str]:
    """Return the SHA-256 of the images that no entry names, by path, and note the others.

    Warns of digests that match no image, and of remaining copies of an image that is excluded by
    its path.

    Args:
        images: images, relative to `directory`.
        entries: paths and SHA-256 digests.

    Raises:
        UserError: a path matches no image, or a file cannot be read.
    """
    paths = [str(path) for path in images]
    known, listed_paths = set(map(_composed, paths)), set(map(_composed, entries))
    named = {entry.lower() for entry in entries if _DIGEST.fullmatch(entry)}
    by_path = [path for path in paths if _composed(path) in listed_paths]
    rest = [path for path in paths if _composed(path) not in listed_paths]
    if lost := [e for e in entries if _composed(e) not in known and not _DIGEST.fullmatch(e)]:
        raise UserError(
            f"data.exclude lists {len(lost)} path(s) that match no image: "
            f"{', '.join(map(repr, lost[:10]))}. Paths are relative to data/raw, with / between "
            "folders. Correct or remove them."
        )
    with ThreadPoolExecutor() as pool:
        found = dict(zip(rest, pool.map(_digest, [directory / path for path in rest]), strict=True))
    gone = {_digest_if_readable(directory / path) for path in by_path} - {""}
    by_digest = [path for path in rest if found[path] in named]
    notes.excluded |= dict.fromkeys(by_path, "is listed by its path")
    notes.excluded |= dict.fromkeys(by_digest, "is listed by its SHA-256")
    notes.unmatched_digests = sorted(named - set(found.values()) - gone)
    if copies := [path for path in rest if found[path] in gone - named]:
        _log.warning(
            "data.exclude lists images by path, and copies of them stay: %s. List the SHA-256 to "
            "leave out every copy.",
            ", ".join(map(repr, copies[:10])),
        )
    if notes.unmatched_digests:
        _log.warning(
            "data.exclude lists %d SHA-256 that match no image: %s",
            len(notes.unmatched_digests),
            ", ".join(notes.unmatched_digests[:10]),
        )
    if notes.excluded:
        _log.warning(
            "data.exclude leaves out %d image(s): %s", len(notes.excluded), listed(notes.excluded)
        )
    return {path: digest for path, digest in found.items() if digest not in named}


def _composed(path: str) -> str:
    """Return a path in one Unicode form: archives made on a Mac spell `ö` as two characters."""
    return unicodedata.normalize("NFC", path)


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise UserError(
            f"{str(path)!r} cannot be read: {error.strerror}. Check the disk or network, and run "
            "the same command again."
        ) from error


def _digest_if_readable(path: Path) -> str:
    """Return the SHA-256 of a file, or an empty string if it cannot be read."""
    try:
        return file_sha256(path)
    except OSError:
        return ""
