"""The source `folder`: class folders in a directory or archive on disk."""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from facegender.data.image_files import IMAGE_SUFFIXES, find_images, kind_of_file
from facegender.data.sources.archive import ArchiveLimits, extract_archive
from facegender.data.sources.raw_directory import emptied_on_error, storable_path
from facegender.errors import UserError

_UNREADABLE = "cannot be read: permission denied"
_PACKED = "is an archive within the data, and stays packed: unpack it where it lies"
_UNUSED = "{} file(s) that are neither images nor CSV"
_log = logging.getLogger(__name__)


def copy_folder(source: Path, target: Path, limits: ArchiveLimits) -> dict[str, str]:
    """Copy the images and metadata CSVs of a directory or archive, keeping their places.

    An image is known by its ending or, where that says nothing, by its first bytes. Hidden files
    and the litter of operating systems are left out. A symbolic link is followed if it leads to
    somewhere else inside `source`. What else is not copied is named in a warning and returned:
    links that lead out, round in a circle or nowhere, pipes and devices, archives within the data,
    and what this user may not read. Files that are neither images nor CSV are counted by ending.

    Args:
        source: a directory, or a zip or tar archive.
        target: an empty directory, made if it is missing; empty again on failure.
        limits: what the archive, or the directory, may hold.

    Returns:
        The reason for each thing left out, by its path in `source` or, as `*.txt`, its ending.

    Raises:
        UserError: `source` is missing, holds no image, exceeds the limits, or cannot be read.
        ValueError: the target is not empty.
    """
    if not source.exists():
        raise UserError(
            f"{str(source)!r} is not a folder or archive. Set the path with "
            "`dvc exp run -S dataset=folder -S dataset.path=PATH`; a relative path "
            "starts at the root of the repository."
        )
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"The folder {str(source)!r} contains this project's own data. Name the folder "
            "whose subfolders are the classes."
        )
    with emptied_on_error(target):
        left_out: dict[str, str] = {}
        if source.is_dir():
            left_out = _copy_tree(source, target, limits)
        else:
            extract_archive(source, target, limits)
            left_out = _remove_unused(target)
        if left_out:
            shown = "; ".join(
                f"{relative!r} {why}" for relative, why in list(left_out.items())[:10]
            )
            _log.warning("Left out %d item(s) of %s: %s", len(left_out), source.name, shown)
        if not find_images(target):
            raise UserError(
                f"{str(source)!r} holds no images. Put them in one folder for each class "
                f"(female/, male/). Known endings are {', '.join(sorted(IMAGE_SUFFIXES))}."
            )
        return left_out


def _remove_unused(directory: Path) -> dict[str, str]:
    """Remove what is neither an image nor a CSV from unpacked data; return what, and why."""
    left_out: dict[str, str] = {}
    others: Counter[str] = Counter()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        relative = PurePosixPath(path.relative_to(directory).as_posix())
        kind = kind_of_file(relative, path)
        if kind == "archive":
            left_out[str(relative)] = _PACKED
        elif kind == "other":
            others[relative.suffix.lower()] += 1
        if kind not in {"image", "table"}:
            path.unlink()
    return dict(sorted((left_out | _count(others)).items()))


def _count(others: Mapping[str, int]) -> dict[str, str]:
    return {f"*{suffix}": _UNUSED.format(count) for suffix, count in others.items()}


def _copy_tree(source: Path, target: Path, limits: ArchiveLimits) -> dict[str, str]:
    """Copy what is wanted of a directory; return what was left out, and why."""
    relative = PurePosixPath()
    try:
        scan = _Scan(source.resolve(), limits)
        scan.walk(source, relative, ())
        for relative, path in tqdm(scan.files, desc="copy", unit="file", disable=None):
            copy = target / relative
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(path, copy)
            except PermissionError as error:
                # Not that of the target.
                if error.filename != str(path):
                    raise
                scan.left_out[str(relative)] = _UNREADABLE
    except OSError as error:
        raise UserError(
            f"Cannot copy {str(error.filename or relative)!r}: {error.strerror}. Check its "
            "permissions, and that the disk has room."
        ) from error
    return dict(sorted((scan.left_out | _count(scan.others)).items()))


@dataclass
class _Scan:
    """What is to be copied from the directory `root`, an absolute path without links."""

    root: Path
    limits: ArchiveLimits
    files: list[tuple[PurePosixPath, Path]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)  # files left out, by ending
    total_bytes: int = 0

    def walk(self, folder: Path, relative: PurePosixPath, above: tuple[Path, ...]) -> None:
        """Collect the files of `folder`, found at `relative`, inside the real folders `above`."""
        above = (*above, folder.resolve())
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except PermissionError:
            if len(above) == 1:
                raise
            self.left_out[str(relative)] = _UNREADABLE
            return
        for entry in entries:
            inner, path = relative / storable_path(PurePosixPath(entry.name)), Path(entry.path)
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_symlink() and not self._may_follow(path, above):
                self.left_out[str(inner)] = (
                    "is a link that leads out of the folder, into itself or nowhere"
                )
            elif entry.is_dir():
                self.walk(path, inner, above)
            elif entry.is_file():
                self._add_wanted(inner, path)
            else:
                self.left_out[str(inner)] = "is a pipe or device"

    def _may_follow(self, link: Path, above: tuple[Path, ...]) -> bool:
        try:
            real = link.resolve(strict=True)
        except (OSError, RuntimeError):  # leads nowhere, or to itself
            return False
        return real.is_relative_to(self.root) and real not in above

    def _add_wanted(self, relative: PurePosixPath, path: Path) -> None:
        try:
            kind = kind_of_file(relative, path)
        except PermissionError:
            self.left_out[str(relative)] = _UNREADABLE
            return
        if kind in {"image", "table"}:
            self._add(relative, path)
        elif kind == "archive":
            self.left_out[str(relative)] = _PACKED
        elif kind == "other":
            self.others[relative.suffix.lower()] += 1

    def _add(self, relative: PurePosixPath, path: Path) -> None:
        self.files.append((relative, path))
        self.total_bytes += path.stat().st_size
        for name, found, most in (
            ("max_files", len(self.files), self.limits.max_files),
            ("max_total_bytes", self.total_bytes, self.limits.max_total_bytes),
        ):
            if found > most:
                raise UserError(
                    f"The folder {self.root.name} exceeds the limit {name} of {most:,}. Check "
                    "that it is the right folder; if so, raise the limit."
                )
