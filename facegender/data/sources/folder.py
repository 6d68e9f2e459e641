"""The source `folder`: class folders in a directory or archive on disk."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from facegender.data.image_files import (
    IMAGE_SUFFIXES,
    find_images,
    is_litter,
    is_photo,
    looks_like_archive,
    looks_like_image,
    read_start,
)
from facegender.data.sources.archive import ArchiveLimits, extract_archive
from facegender.data.sources.raw_directory import emptied_on_error, storable_path
from facegender.errors import UserError, listed

OTHER = "is neither an image nor a CSV"
_PACKED = "is an archive in the source: unpack it first"
_SPREADSHEETS = frozenset({".ods", ".parquet", ".tsv", ".xls", ".xlsm", ".xlsx"})
_LINK = "is a link that leads out of the folder, into itself or nowhere"
_UNREADABLE = "cannot be read: permission denied"
# Most links to folders in a path. If each folder links twice to the next, the number of paths
# doubles with each link.
_MAX_LINKS = 2
_log = logging.getLogger(__name__)


def copy_folder(source: Path, target: Path, limits: ArchiveLimits) -> dict[str, str]:
    """Copy the images and metadata CSVs of a directory or archive, under the same paths.

    Hidden files and the litter of operating systems are not copied. A symbolic link is followed if
    it leads elsewhere inside `source`; a link to a folder only if it is one of the first two on its
    path. Other links, pipes, devices, archives, files without permission, and files that are
    neither images nor CSVs, by their endings and first bytes, are named in a warning and returned.

    Args:
        source: directory, or zip or tar archive.
        target: empty directory, created if missing; empty again on failure.

    Returns:
        The reason for each item that is left out, by its path in `source`.

    Raises:
        UserError: `source` is missing, holds no image, exceeds the limits, cannot be read, or holds
            two names that `storable_path` makes equal.
        ValueError: the target is not empty.
    """
    _check_source(source, target)
    with emptied_on_error(target):
        left_out: dict[str, str] = {}
        if source.is_dir():
            left_out = _copy_tree(source, target, limits)
        else:
            extract_archive(
                source,
                target,
                limits,
                keep=lambda path, start: wanted(path, lambda: start, left_out),
            )
        log_left_out(left_out, source.name)
        if not find_images(target):
            packed = [path for path, reason in left_out.items() if reason == _PACKED]
            links = [path for path, reason in left_out.items() if reason == _LINK]
            inside = f", but archives: unpack {packed[0]!r} first" if packed else ""
            if links and not packed:
                inside = (
                    f", but links that lead out of it, such as {links[0]!r}: copy the folder with "
                    "`cp -rL` and name the copy"
                )
            raise UserError(
                f"{str(source)!r} holds no images{inside}. Put them into one folder for each class "
                f"(female/, male/). Known endings are {', '.join(sorted(IMAGE_SUFFIXES))}."
            )
        return left_out


def list_folder(
    source: Path, target: Path, limits: ArchiveLimits, digest: Callable[[Path], str]
) -> dict[str, str]:
    """Return what identifies the content of a directory or archive.

    Args:
        target: directory that `copy_folder` will fill.

    Returns:
        By path in `source`, the digest of each file that `copy_folder` copies, and the reason for
        each item that it leaves out; for an archive, its own digest.

    Raises:
        UserError: `source` is missing, exceeds the limits, cannot be read, or lies in `target` or
            contains it.
    """
    _check_source(source, target, copied=target.is_dir())
    files = {PurePosixPath(source.name): source}
    listing: dict[str, str] = {}
    with _named_faults(source):
        if source.is_dir():
            scan = _Scan(source.resolve(), limits)
            scan.walk(source, PurePosixPath(), ())
            files, listing = scan.files, scan.left_out
        for relative, path in tqdm(files.items(), desc="list", unit="file", disable=None):
            try:
                listing[str(relative)] = digest(path)
            except PermissionError:
                listing[str(relative)] = _UNREADABLE
    return listing


def _check_source(source: Path, target: Path, *, copied: bool = False) -> None:
    real, ours = (Path(os.path.realpath(path)) for path in (source, target))
    if real.is_relative_to(ours):
        raise UserError(
            f"dataset.path is {str(source)!r}, and {str(target)!r} belongs to DVC, which removes "
            "all files there that it did not make. Move your images elsewhere, and name that "
            "folder."
        )
    if ours.is_relative_to(real):
        raise UserError(
            f"The folder {str(source)!r} contains this project's own data. Name the folder "
            "whose subfolders are the classes."
        )
    if source.name == "???":  # Hydra's mark of a value that has to be given
        raise UserError(
            "dataset.path is not set: add `-S dataset.path=PATH` to your command, where PATH is a "
            "folder or archive. A relative path starts at the root of the repository."
        )
    if not source.is_dir() and not source.is_file():
        without = (
            f" If {target} already holds its images, and this machine lacks the folder, add "
            "`--downstream split` to `dvc repro` or `dvc exp run`."
        )
        raise UserError(
            f"{str(source)!r} is not a folder or archive. Repeat your whole `dvc exp run` "
            "command with the right absolute path in `-S dataset.path=PATH`."
            f"{without if copied else ''}"
        )


@contextmanager
def _named_faults(source: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot copy {str(error.filename or source)!r}: {error.strerror}. Check its "
            "permissions, and that the disk has room."
        ) from error


def log_left_out(left_out: dict[str, str], source: str) -> None:
    """Warn of the items of a source that the pipeline does not use, if any."""
    if left_out:
        _log.warning("Left out %d item(s) of %s: %s", len(left_out), source, listed(left_out))


def summarize(left_out: dict[str, str]) -> dict[str, Any]:
    """Return, for JSON, what was `left_out`, and `other_files` counted by ending, if any."""
    named = {path: reason for path, reason in sorted(left_out.items()) if reason != OTHER}
    other: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path, reason in left_out.items() if reason == OTHER):
        ending = PurePosixPath(path).suffix.lower() or "none"
        other.setdefault(ending, {"count": 0, "example": path})["count"] += 1
    found = {"left_out": named, "other_files": other}
    return {name: value for name, value in found.items() if value}


def name_rest(directory: Path, source: str) -> dict[str, str]:
    """Return the reason for each file of an unpacked `source` that the pipeline does not use."""
    left_out: dict[str, str] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            wanted(PurePosixPath(path.relative_to(directory)), partial(read_start, path), left_out)
    log_left_out(left_out, source)
    return left_out


def wanted(path: PurePosixPath, read: Callable[[], bytes], left_out: dict[str, str]) -> bool:
    """Return whether a file is an image or a CSV; if not, add the reason to `left_out`.

    Args:
        path: path of the file, relative to the source.
        read: function that returns its first 512 bytes; called only if its ending is unknown.
        left_out: reasons by path; litter gets none.
    """
    if is_litter(path):
        return False
    if is_photo(path) or path.suffix.lower() == ".csv":
        return True
    start = read()
    if looks_like_image(start):
        return True
    if path.suffix.lower() in _SPREADSHEETS:
        left_out[str(path)] = "is a table of another kind: save it as CSV"
    elif looks_like_archive(start):
        left_out[str(path)] = _PACKED
    else:
        left_out[str(path)] = OTHER
    return False


def _copy_tree(source: Path, target: Path, limits: ArchiveLimits) -> dict[str, str]:
    """Copy the wanted files of a directory; return the reasons for the others."""
    with _named_faults(source):
        scan = _Scan(source.resolve(), limits)
        scan.walk(source, PurePosixPath(), ())
        for relative, path in tqdm(scan.files.items(), desc="copy", unit="file", disable=None):
            copy = target / relative
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(path, copy)
            except PermissionError as error:
                # The target's own permissions are an error.
                if error.filename != str(path):
                    raise
                scan.left_out[str(relative)] = _UNREADABLE
    return dict(sorted(scan.left_out.items()))


@dataclass
class _Scan:
    """Files to copy from the directory `root`, an absolute path without links."""

    root: Path
    limits: ArchiveLimits
    files: dict[PurePosixPath, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    total_bytes: int = 0

    def walk(
        self, folder: Path, relative: PurePosixPath, above: tuple[Path, ...], links: int = 0
    ) -> None:
        """Collect the files of `folder`, found at `relative`, inside the real folders `above`.

        `links` of them were reached by links.
        """
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
            if is_litter(PurePosixPath(entry.name)):
                continue
            if entry.is_symlink() and not self._may_follow(path, above):
                self.left_out[str(inner)] = _LINK
            elif entry.is_dir() and entry.is_symlink() and links == _MAX_LINKS:
                self.left_out[str(inner)] = f"is a link to a folder inside {_MAX_LINKS} others"
            elif entry.is_dir():
                self.walk(path, inner, above, links + entry.is_symlink())
            elif not entry.is_file():
                self.left_out[str(inner)] = "is a pipe or device"
            elif wanted(inner, partial(read_start, path), self.left_out):
                self._add(inner, path)

    def _may_follow(self, link: Path, above: tuple[Path, ...]) -> bool:
        try:
            real = link.resolve(strict=True)
        except (OSError, RuntimeError):  # it leads nowhere, or to itself
            return False
        return real.is_relative_to(self.root) and real not in above

    def _add(self, relative: PurePosixPath, path: Path) -> None:
        if (other := self.files.setdefault(relative, path)) is not path:
            raise UserError(
                f"Two files would both be stored as {str(relative)!r}, because DVC cannot hold the "
                f"name of one: {os.fsencode(other)!r} and {os.fsencode(path)!r}. Rename one."
            )
        self.total_bytes += path.stat().st_size
        for name, unit, found, most in (
            ("archive.max_files", "files", len(self.files), self.limits.max_files),
            ("archive.max_gigabytes", "bytes", self.total_bytes, self.limits.max_total_bytes),
        ):
            if found > most:
                raise UserError(
                    f"The folder {self.root.name} has more than {most:,} {unit}. Check that it is "
                    f"the right folder; if so, raise {name}."
                )
