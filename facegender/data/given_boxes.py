"""Boxes of faces from a table of the dataset, which replace the detector's."""

import csv
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pandas as pd

from facegender.data.image_files import find_images, find_tables
from facegender.data.image_finder import ImageFinder
from facegender.data.labelling_notes import Notes
from facegender.data.metadata import as_written, read_csv, rows_by_image
from facegender.errors import UserError
from facegender.params import Boxes

Box = tuple[float, float, float, float]


def read_boxes(
    directory: Path, paths: Sequence[str], boxes: Boxes, notes: Notes
) -> dict[str, list[Box]]:
    """Read the boxes of images from one or more CSVs.

    A row names its image as in `label_sources.label_by_table`. An image may have several rows.

    Args:
        paths: images whose boxes to read, relative to `directory`.
        notes: where to note rows that match no image, or several.

    Returns:
        Boxes by path: left, top, width and height in pixels of the upright image, NaN where a cell
        is not a number. Images without a row are missing.

    Raises:
        UserError: no CSV has such a name, or one cannot be read or lacks a column.
    """
    sources = find_tables(directory, boxes.file)
    if not sources:
        raise UserError(
            f"image.crop.boxes.file is {boxes.file!r}, and the data hold no such file. Correct it, "
            "or set image.crop.boxes to null to take the detector's boxes."
        )
    columns = [boxes.left, boxes.top, boxes.width, boxes.height]
    used = set(paths)
    every = [str(path) for path in find_images(directory)]
    finder = ImageFinder(every, set(every) - used)
    found: dict[str, list[Box]] = {}
    for source in sources:
        name = source.relative_to(directory).as_posix()
        try:
            table, files, given = read_csv(source, boxes.image)
            written = [as_written(column, list(given)) for column in columns]
            if missing := [column for column in written if column not in given]:
                raise ValueError(f"it has no `{missing[0]}` column")
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(
                f"Cannot take boxes from {name}: {error}. image.crop.boxes names its columns."
            ) from error
        numbers = table[[given[column] for column in written]].apply(pd.to_numeric, errors="coerce")
        rows = rows_by_image(numbers, files, PurePosixPath(name), finder, notes)
        rows = rows[rows.index.isin(used)]
        values = rows.to_numpy(dtype=float, na_value=float("nan")).tolist()
        for path, (left, top, width, height) in zip(rows.index, values, strict=True):
            known = found.setdefault(path, [])
            if (box := (left, top, width, height)) not in known:  # a row may come twice
                known.append(box)
    return found
