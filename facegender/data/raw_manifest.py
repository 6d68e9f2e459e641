"""The manifest of the raw data: each image with its label, digest and metadata."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from facegender.data.exclusions import exclude_images
from facegender.data.image_files import IMAGE_SUFFIXES, find_images, find_tables
from facegender.data.label_sources import (
    compare_folders,
    compare_labels,
    label_by_name,
    label_by_table,
    label_images,
)
from facegender.data.metadata import read_metadata
from facegender.data.notes import Notes
from facegender.errors import UserError
from facegender.labels import LABELS
from facegender.params import Boxes, FilenameLabels, Labels, TableLabels


def build_manifest(
    directory: Path,
    *,
    female: Sequence[str],
    male: Sequence[str],
    ignore: Sequence[str],
    labels: Labels | None = None,
    boxes: Boxes | None = None,
    exclude: Sequence[str] = (),
    max_unlabelled: float = 0,
    notes: Notes | None = None,
) -> pd.DataFrame:
    """Return the manifest of the raw data in `directory`, sorted by path.

    Args:
        labels: where labels come from; None for folders.
        boxes: boxes of faces in the data, which are not metadata.
        exclude: paths below `directory`, or SHA-256 digests, of images to leave out.
        max_unlabelled: share of the images that may lack a label in the table or file name.

    Raises:
        UserError: no image, or none of a class, is left; or as `exclude_images`, `label_images`,
            `label_by_table`, `label_by_name` and `read_metadata` do.
    """
    notes = Notes() if notes is None else notes
    found = find_images(directory)
    if not found:
        raise UserError(
            f"{directory.name}/ holds no images. Put them into one folder for each class "
            f"(female/, male/). Known endings are {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    digests = exclude_images(found, directory, exclude, notes)
    paths = [path for path in found if str(path) in digests]
    unused: dict[Path, Sequence[str]] = {}
    if boxes:
        sides = (boxes.left, boxes.top, boxes.width, boxes.height)
        unused = dict.fromkeys(find_tables(directory, boxes.file), sides)
    tables: list[Path] = []
    if isinstance(labels, TableLabels):
        manifest, tables = label_by_table(directory, paths, labels, notes, unused)
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
                f"{len(manifest)} are labelled as the other class, {len(notes.unlabelled)} have no "
                f"label, {notes.ignored} are ignored and {len(notes.excluded)} excluded. Check the "
                "data, `left_out` in data/raw.json, and what means each class: split.classes for "
                "folders, else dataset.labels, in params.yaml."
            )
    manifest.insert(2, "sha256", manifest["path"].map(digests))
    metadata = read_metadata(directory, found, notes, skip=tables, unused=unused)
    taken = {name: f"metadata_{name}" for name in metadata if name in manifest}
    manifest = manifest.join(metadata.rename(columns=taken), on="path")
    if isinstance(labels, TableLabels | FilenameLabels):
        compare_folders(manifest, female, male, notes)
        female, male = labels.female, labels.male
    compare_labels(manifest, female, male, notes)
    return manifest
