"""The images that `data.exclude` leaves out."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pandas as pd

from facegender.data.notes import Notes
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


def exclude_paths(
    images: Sequence[PurePosixPath], entries: Sequence[str], notes: Notes
) -> list[PurePosixPath]:
    """Return the images whose path is not an entry, and note the others."""
    named = {str(path) for path in images} & set(entries)
    notes.excluded |= dict.fromkeys(sorted(named), "is listed by its path")
    return [path for path in images if str(path) not in named]


def exclude_digests(
    manifest: pd.DataFrame, directory: Path, entries: Sequence[str], notes: Notes
) -> pd.DataFrame:
    """Return the rows whose SHA-256 is not an entry, and note the others.

    Warns of remaining copies of an image that is excluded by its path.
    """
    digests = {entry.lower() for entry in entries if _DIGEST.fullmatch(entry)}
    named = manifest["sha256"].isin(digests)
    rest = manifest[~named].reset_index(drop=True)
    gone = {_digest_if_readable(directory / path) for path in notes.excluded} - {""}
    if copies := list(rest["path"][rest["sha256"].isin(gone)]):
        _log.warning(
            "data.exclude lists images by path, and copies of them stay: %s. List the SHA-256 to "
            "leave out every copy.",
            ", ".join(map(repr, copies[:10])),
        )
    notes.excluded |= dict.fromkeys(manifest["path"][named], "is listed by its SHA-256")
    notes.unmatched_digests = sorted(digests - set(manifest["sha256"]) - gone)
    return rest


def _digest_if_readable(path: Path) -> str:
    """Return the SHA-256 of a file, or an empty string if it cannot be read."""
    try:
        return file_sha256(path)
    except OSError:
        return ""


def refuse_unmatched(entries: Sequence[str], notes: Notes) -> None:
    """Log excluded images and unmatched digests. Raises UserError if a path matches no image."""
    lost = [e for e in entries if e not in notes.excluded and not _DIGEST.fullmatch(e)]
    if lost:
        raise UserError(
            f"data.exclude lists {len(lost)} path(s) that match no image: "
            f"{', '.join(map(repr, lost[:10]))}. Paths are relative to data/raw, with / between "
            "folders. Correct or remove them."
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
