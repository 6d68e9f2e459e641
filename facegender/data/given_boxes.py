"""Boxes of faces that a table of the dataset gives, to be taken instead of the detector's."""

import csv
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pandas as pd

from facegender.data.label_sources import image_finder
from facegender.data.metadata import read_csv
from facegender.data.notes import Notes
from facegender.errors import UserError
from facegender.params import Boxes

Box = tuple[float, float, float, float]


def read_boxes(
    directory: Path, paths: Sequence[str], boxes: Boxes, notes: Notes
) -> dict[str, list[Box]]:
    """Read the boxes of images from one or more CSVs.

    A row names its image as in `label_sources.label_by_table`. An image may have several rows.

    Args:
        directory: raw data.
        paths: images, relative to `directory`.
        boxes: which CSVs, and which columns.
        notes: where to note rows that match no image.

    Returns:
        By path, its boxes: left, top, width and height in pixels of the upright image. What is not
        a number is NaN. Images without a row are missing.

    Raises:
        UserError: no CSV has such a name, or one cannot be read or lacks a column.
    """
    sources = sorted(directory.rglob(boxes.file))
    if not sources:
        raise UserError(
            f"image.crop.boxes.file is {boxes.file!r}, and the data hold no such file. Correct it, "
            "or set image.crop.boxes to null to take the detector's boxes."
        )
    columns = [boxes.left, boxes.top, boxes.width, boxes.height]
    find = image_finder(paths)
    found: dict[str, list[Box]] = {}
    for source in sources:
        name = source.relative_to(directory).as_posix()
        try:
            table, files, given = read_csv(source, boxes.image)
            if missing := [column for column in columns if column not in given]:
                raise ValueError(f"it has no `{missing[0]}` column")
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(
                f"Cannot take boxes from {name}: {error}. image.crop.boxes names its columns."
            ) from error
        numbers = table[[given[column] for column in columns]].apply(pd.to_numeric, errors="coerce")
        values = numbers.to_numpy(dtype=float, na_value=float("nan")).tolist()
        parent = PurePosixPath(source.parent.relative_to(directory).as_posix())
        lost = []
        for file, (left, top, width, height) in zip(files, values, strict=True):
            path = find(parent, file, name)
            if path is None:
                lost.append(file)
            else:
                found.setdefault(path, []).append((left, top, width, height))
        notes.unmatched(name, lost, len(files), next(iter(paths), None))
        # Metadata has no use for a table without a `file` column, but this one is used.
        notes.skipped_tables.pop(name, None)
    return found
