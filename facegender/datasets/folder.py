"""The source `folder`: class folders in a directory or archive on disk."""

import logging
import os
import shutil
from pathlib import Path

from tqdm import tqdm

from facegender.datasets.archive import ArchiveLimits, extract_archive, is_archive
from facegender.errors import UserError
from facegender.manifest import IMAGE_SUFFIXES

_log = logging.getLogger(__name__)


def copy_folder(source: Path, target: Path, limits: ArchiveLimits) -> None:
    """Copy the images and metadata CSVs of a directory or archive, keeping their places.

    Hidden files and other litter are left out. A link is followed if it leads to a file inside
    `source`; links that lead elsewhere, or in circles, are counted and left out.

    Args:
        source: a directory, or a zip or tar archive.
        target: existing, empty directory.
        limits: for an archive.

    Raises:
        UserError: `source` is missing, holds no image, or a file of it cannot be read.
    """
    if source.is_dir():
        _copy_tree(source, target)
    elif source.is_file() and is_archive(source):
        extract_archive(source, target, limits)
    elif source.exists():
        raise UserError(f"{source.name} is neither a folder nor a zip or tar archive.")
    else:
        raise UserError(
            f"There is no folder or archive {str(source)!r}. Set it with "
            "`dvc exp run -S dataset=folder -S dataset.path=PATH`; a path that is not absolute "
            "counts from the root of the repository."
        )
    if not any(path.suffix.lower() in IMAGE_SUFFIXES for path in target.rglob("*")):
        raise UserError(
            f"There is no image in {source.name}: put them in one folder for each class (female/, "
            f"male/). Known endings are {', '.join(sorted(IMAGE_SUFFIXES))}."
        )


def _copy_tree(source: Path, target: Path) -> None:
    root = source.resolve()
    paths, outside = [], 0
    for folder, subfolders, files in os.walk(source):
        # Sorted, so that the log and the bar are the same every time.
        subfolders[:] = sorted(name for name in subfolders if not _is_litter(name))
        linked = [name for name in subfolders if Path(folder, name).is_symlink()]
        outside += len(linked)
        for name in sorted(files):
            path = Path(folder, name)
            if _is_litter(name) or path.suffix.lower() not in IMAGE_SUFFIXES | {".csv"}:
                continue
            try:
                inside = path.resolve(strict=True).is_relative_to(root)
            except (OSError, RuntimeError):  # a link to nothing, or to itself
                inside = False
            if inside:
                paths.append(path)
            else:
                outside += 1
    for path in tqdm(paths, desc="copy", unit="file", mininterval=1):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(path, copy)
        except OSError as error:
            raise UserError(
                f"Cannot read {path.relative_to(source)}: {error.strerror}. Mend its permissions, "
                "or move it away."
            ) from error
    if outside:
        _log.warning("left out %d link(s) that lead out of %s or nowhere", outside, source.name)


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name in {"__MACOSX", "Thumbs.db"}
