"""Metadata from CSV files beside the images."""

import csv
import logging
from collections.abc import Container, Sequence
from pathlib import Path, PurePosixPath

import pandas as pd

from facegender.data.manifest import COLUMNS
from facegender.data.notes import Notes
from facegender.errors import UserError

# Columns that this project gives its own meaning, in manifests and predictions.
_OURS = {*COLUMNS, "row", "probability", "predicted"}
_log = logging.getLogger(__name__)


def read_metadata(
    directory: Path,
    images: Sequence[PurePosixPath],
    notes: Notes | None = None,
    *,
    skip: Container[Path] = (),
) -> pd.DataFrame:
    """Collect the columns of every CSV under `directory` that has a `file` column.

    Each `file` is a path relative to its CSV; backslashes separate folders, too. Every value is
    text, and only an empty cell is missing. A CSV that cannot be parsed is named and skipped; rows
    that match no image are counted. A column named like one of ours gets the prefix `metadata_`.

    Args:
        directory: the raw data.
        images: all images, relative to `directory`.
        notes: where to note CSVs that are skipped, and rows that match no image.
        skip: CSVs that give labels.

    Returns:
        A frame indexed by the image's path relative to `directory`; empty if there is no CSV.

    Raises:
        UserError: two rows say different things of one image, or a CSV cannot be opened.
    """
    notes = Notes() if notes is None else notes
    known = {str(path) for path in images}
    tables = []
    for source in sorted(directory.rglob("*.csv")):
        if source in skip:
            continue
        name = source.relative_to(directory).as_posix()
        try:
            table, files, _ = read_csv(source)
        except OSError as error:
            raise UserError(f"Cannot read the metadata file {name}: {error.strerror}.") from error
        except (ValueError, csv.Error) as error:
            _log.warning("%s is skipped: %s", name, error)
            notes.skipped_tables[name] = str(error)
            continue
        parent = PurePosixPath(source.parent.relative_to(directory).as_posix())
        table.index = pd.Index(
            [_image_path(parent, file, known) for file in files], dtype=str, name="path"
        )
        matched = table.index.isin(known)
        notes.unmatched(
            name, list(table.index[~matched]), len(table), next(iter(sorted(known)), None)
        )
        tables.append(table[matched])
    if not tables:
        return pd.DataFrame(index=pd.Index([], name="path"))
    return one_row_each(pd.concat(tables), "The metadata describes")


def one_row_each(table: pd.DataFrame, subject: str) -> pd.DataFrame:
    """Return the rows without repetitions.

    Args:
        table: rows, indexed by `path`.
        subject: start of the sentence that names what disagrees.

    Raises:
        UserError: two rows of one path differ.
    """
    table = table[~table.reset_index().duplicated().to_numpy()]
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()].unique()[:5]
        raise UserError(
            f"{subject} the same file more than once: {', '.join(twice)}. Keep one row for each "
            "file."
        )
    return table


def read_csv(
    source: Path, file_column: str = "file"
) -> tuple[pd.DataFrame, pd.Series, dict[str, str]]:
    """Read the rows that name a file, all as text, with the columns' names made unique.

    Returns:
        The other columns, the files that the rows name, and by the header's names those that the
        columns have got.

    Raises:
        ValueError: the CSV has no such column, a longer row than its header, or is not UTF-8.
        csv.Error: the CSV cannot be parsed.
    """
    with source.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = [name.strip() for name in next(csv.reader(file), [])]
    if file_column not in header:
        raise ValueError(f"it has no `{file_column}` column")
    names: list[str] = []
    for number, name in enumerate(header, 1):
        free = our_name(name or f"column_{number}")
        names.append(f"{free}.{number}" if free in names else free)
    rows = []
    with source.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        next(reader)
        for row in reader:
            if any(row[len(names) :]):
                raise ValueError(f"line {reader.line_num} has more cells than the header")
            rows.append(dict(zip(names, row, strict=False)))
    table = pd.DataFrame(rows, columns=names, dtype="string").replace("", pd.NA)
    given = dict(zip(reversed(header), reversed(names), strict=True))
    empty = [
        name
        for name, called in zip(names, header, strict=True)
        if not called and table[name].isna().all()
    ]
    table = table[table[given[file_column]].notna()].drop(columns=empty)
    files = table.pop(given[file_column])
    return table, files, given


def our_name(name: str) -> str:
    """Return the name of a metadata column, kept apart from those of manifests."""
    return f"metadata_{name}" if name in _OURS else name


def _image_path(parent: PurePosixPath, file: str, known: Container[str]) -> str:
    path = str(parent / file)
    return path if path in known else str(parent / file.replace("\\", "/"))
