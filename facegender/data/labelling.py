"""Labels from folder names, and the manifest of the raw data."""

from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import pandas as pd

from facegender.data.exclusions import (
    digest_if_readable,
    exclude_digests,
    exclude_paths,
    refuse_unmatched,
)
from facegender.data.image_files import IMAGE_SUFFIXES, find_images
from facegender.data.label_sources import label_by_name, label_by_table, meanings
from facegender.data.manifest import SPLIT_FOLDERS
from facegender.data.metadata import read_metadata
from facegender.data.notes import Notes
from facegender.errors import UserError
from facegender.labels import LABELS
from facegender.params import FilenameLabels, Labels, TableLabels


def label_images(
    paths: Sequence[PurePosixPath],
    *,
    female: Sequence[str],
    male: Sequence[str],
    ignore: Sequence[str],
) -> pd.DataFrame:
    """Give each image the label of the folders above it whose names, in any case, are aliases.

    An alias of one letter counts only at the top level of the dataset: below folders that all
    images share or that name a split. Elsewhere such folders sort names by their first letter.

    Args:
        paths: images, relative to the raw data.
        female: folder names that mean female.
        male: folder names that mean male.
        ignore: folder names whose images are left out, unless a nearer folder names a class.

    Returns:
        A frame with the columns `path` (str) and `label` (int), in the order of `paths`.

    Raises:
        UserError: an image lies below no known folder, or below folders of both classes.
    """
    meaning = meanings(female, male, ignore, "split.classes", "folder name")
    shared = _shared_folders(paths)
    rows: list[tuple[str, int]] = []
    unknown: dict[str, int] = {}
    contradicting: list[str] = []
    for path in paths:
        found = [meaning[name] for name in _class_folders(path, meaning, shared)]
        if not found:
            folder = str(path.parent)
            unknown[folder] = unknown.get(folder, 0) + 1
        elif (label := found[-1]) is not None:
            if {0, 1} <= set(found):
                contradicting.append(str(path))
            rows.append((str(path), label))

    if contradicting:
        shown = ", ".join(repr(path) for path in contradicting[:10])
        raise UserError(
            f"{len(contradicting)} image(s) lie below folders of both classes: {shown}. Rename or "
            "move the folders, or remove a name from split.classes in params.yaml."
        )
    if "." in unknown and len(unknown) == 1:
        raise UserError(
            f"Cannot tell the class of {unknown['.']} image(s): they are in no subfolder, and "
            "labels come from folder names. If labels are in a table or in the file names, "
            "use dataset=table, filename, celeba, fairface or utkface; else sort the images into "
            "class folders (female/, male/). docs/kaggle.md shows each."
        )
    if unknown:
        listed = ", ".join(
            f"{folder!r} ({count})" for folder, count in sorted(unknown.items())[:20]
        )
        raise UserError(
            f"Cannot tell the class of the images in {len(unknown)} folder(s): {listed}. Known "
            f"names, in any case, are {', '.join(female)} for female (0) and {', '.join(male)} for "
            "male (1). Map a folder by adding its name, for example with "
            "`dvc exp run -S 'split.classes.female=[ladies]' -S 'split.classes.male=[gents]'`, or "
            "leave it out with `-S 'split.classes.ignore=[unknown]'`."
        )
    frame = pd.DataFrame(rows, columns=["path", "label"]).astype({"path": str, "label": int})
    return frame


def _shared_folders(paths: Sequence[PurePosixPath]) -> int:
    """Return the number of leading folders that all paths share."""
    parents = [path.parent.parts for path in paths]
    if not parents:
        return 0
    first, last = min(parents), max(parents)
    return next(
        (
            index
            for index, names in enumerate(zip(first, last, strict=False))
            if len(set(names)) > 1
        ),
        min(len(first), len(last)),
    )


def _class_folders(path: PurePosixPath, known: Container[str], shared: int) -> list[str]:
    """Return the known folder names above an image, outermost first."""
    found = []
    top = True
    for index, part in enumerate(path.parent.parts):
        name = part.casefold()
        if name in known and (top or len(name) > 1):
            found.append(name)
        top = top and (name in SPLIT_FOLDERS or (index < shared and name not in known))
    return found


def build_manifest(
    directory: Path,
    *,
    female: Sequence[str],
    male: Sequence[str],
    ignore: Sequence[str],
    labels: Labels | None = None,
    exclude: Sequence[str] = (),
    max_unlabelled: float = 0,
    notes: Notes | None = None,
) -> pd.DataFrame:
    """Return the manifest of the raw data in `directory`, sorted by path.

    The digest of a file that cannot be read is empty; the data checks name it with the reason.

    Args:
        directory: raw data.
        female: folder names that mean female.
        male: folder names that mean male.
        ignore: folder names whose images are left out.
        labels: where labels come from; None for folders.
        exclude: paths below `directory`, or SHA-256 digests, of images to leave out.
        max_unlabelled: share of the images that may be without label, by table or file name.
        notes: where to note what is left out.

    Raises:
        UserError: no image, or none of a class, is left; an excluded path does not exist; or as
            `label_images`, `label_by_table`, `label_by_name` and `read_metadata` do.
    """
    notes = Notes() if notes is None else notes
    found = find_images(directory)
    if not found:
        raise UserError(
            f"{directory.name}/ holds no images. Put them in one folder for each class "
            f"(female/, male/). Known endings are {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    paths = exclude_paths(found, exclude, notes)
    tables: list[Path] = []
    if isinstance(labels, TableLabels):
        manifest, tables = label_by_table(directory, paths, labels, notes)
    elif isinstance(labels, FilenameLabels):
        manifest = label_by_name(paths, labels, notes)
    else:
        manifest = label_images(paths, female=female, male=male, ignore=ignore)
    notes.ignored = len(paths) - len(manifest) - len(notes.unlabelled)
    notes.limit_unlabelled(max_unlabelled, len(paths))
    for name, label in LABELS.items():
        if not (manifest["label"] == label).any():
            raise UserError(
                f"No image is labelled {name}: of {len(found)} image file(s) found, "
                f"{len(manifest)} are labelled as the other class, {notes.ignored} are ignored and "
                f"{len(notes.excluded)} excluded. Check the data, and what means each class: "
                "split.classes for folders, else dataset.labels, in params.yaml."
            )
    with ThreadPoolExecutor() as pool:
        files = [directory / path for path in manifest["path"]]
        manifest.insert(2, "sha256", list(pool.map(digest_if_readable, files)))
    manifest = exclude_digests(manifest, directory, exclude, notes)
    refuse_unmatched(exclude, notes)
    metadata = read_metadata(directory, found, notes, skip=tables)
    taken = {name: f"metadata_{name}" for name in metadata if name in manifest}
    return manifest.join(metadata.rename(columns=taken), on="path")
