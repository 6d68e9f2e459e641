"""Finds the image that a row of a table describes, by the name in the row."""

import re
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath
from posixpath import normpath

from facegender.data.image_files import IMAGE_SUFFIXES

_Parts = tuple[str, ...]
# /home/me/faces/1.jpg, or C:/faces/1.jpg: a path on another machine.
_ABSOLUTE = re.compile(r"\A(/|[A-Za-z]:/)+")


class ImageFinder:
    """Finds images by the paths and names that people write into tables.

    Args:
        images: all images, including unused ones, so that their rows match no other image.
        unused: images that are left out. A name that also fits a used image means the used one.
    """

    def __init__(self, images: Sequence[str], unused: Collection[str] = ()) -> None:
        self._images = images
        self._unused = frozenset(unused)
        self._known = set(images)
        # Images by their last parts, for each number of parts, with and without the ending.
        self._endings: dict[tuple[int, bool], dict[_Parts, list[str]]] = {}
        self._folders = {"."} | {
            str(folder) for image in images for folder in PurePosixPath(image).parents
        }
        # Names of folders, by the number of parts that follow them in a path.
        self._above: dict[int, set[str]] = {}

    @property
    def example(self) -> str | None:
        """The first image that is used, if there is one."""
        return next((image for image in self._images if image not in self._unused), None)

    def find(self, folder: PurePosixPath, name: str) -> list[str]:
        """Return the images that fit a name: one if it is unambiguous.

        A name is a path relative to its table or to the raw data, or the end of one. If that fits
        no image, these are ignored: case, Unicode form, a missing ending (`000001` for 000001.jpg)
        and the leading folders of an absolute path, unless the data have a folder of that name at
        the same depth. Images in or below the table's folder take precedence.

        Args:
            folder: folder of the table, relative to the raw data.
            name: name in the row; backslashes also separate folders.
        """
        slashed = _slashed(name)
        for path in (str(folder / name), normpath(folder / slashed), normpath(slashed)):
            if path in self._known:
                return [path]
        parts = _parts(PurePosixPath(_ABSOLUTE.sub("", slashed)))
        shortest = 1 if _ABSOLUTE.match(slashed) else len(parts)
        with_ending = PurePosixPath(slashed).suffix.lower() in IMAGE_SUFFIXES
        if not parts:
            return []
        for count in range(len(parts), shortest - 1, -1):
            if count < len(parts) and parts[-count - 1] in self._folders_above(count):
                break  # this folder exists, but the image is gone
            for ending in (True,) if with_ending else (True, False):
                fitting = self._below(folder, self._ending_in(parts[-count:], ending))
                same = [path for path in fitting if path.endswith(slashed)]
                if fitting:
                    return self._used(same or fitting)
        return []

    def _used(self, fitting: list[str]) -> list[str]:
        return [image for image in fitting if image not in self._unused] or fitting[:1]

    def _folders_above(self, count: int) -> set[str]:
        if count not in self._above:
            paths = (_parts(PurePosixPath(image)) for image in self._images)
            self._above[count] = {parts[-count - 1] for parts in paths if len(parts) > count}
        return self._above[count]

    def _ending_in(self, parts: _Parts, with_ending: bool) -> list[str]:
        key = (len(parts), with_ending)
        if key not in self._endings:
            by_ending = self._endings[key] = {}
            for image in self._images:
                path = PurePosixPath(image)
                named = path if with_ending else path.with_suffix("")
                by_ending.setdefault(_parts(named)[-len(parts) :], []).append(image)
        return self._endings[key].get(parts, [])

    def _below(self, folder: PurePosixPath, images: list[str]) -> list[str]:
        if str(folder) not in self._folders:
            return images
        return [image for image in images if PurePosixPath(image).is_relative_to(folder)]


def is_named_exactly(image: str, name: str) -> bool:
    """Return whether an image's path ends in the name of a row, letter for letter."""
    written = normpath(_slashed(name))
    while written.startswith("../"):
        written = written.removeprefix("../")
    return image.endswith((name, written))


def _slashed(name: str) -> str:
    return name.strip().replace("\\", "/")


def _parts(path: PurePosixPath) -> _Parts:
    """Return the parts of a path in a form that ignores case and Unicode form."""
    return tuple(unicodedata.normalize("NFC", part).casefold() for part in path.parts)
