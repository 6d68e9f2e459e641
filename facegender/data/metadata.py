"""Metadata from CSV files beside the images."""

import codecs
import csv
from collections.abc import Container, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

import pandas as pd

from facegender.data.image_files import find_tables
from facegender.data.image_finder import ImageFinder
from facegender.data.manifest import COLUMNS
from facegender.data.notes import Notes
from facegender.errors import UserError

# Columns that this project gives its own meaning, in manifests and predictions.
_OURS = {*COLUMNS, "row", "probability", "predicted"}
_DELIMITERS = (",", ";", "\t")


class MissingColumnError(ValueError):
    """A CSV lacks a column."""


def read_metadata(
    directory: Path,
    images: Sequence[PurePosixPath],
    notes: Notes | None = None,
    *,
    skip: Container[Path] = (),
) -> pd.DataFrame:
    """Collect the columns of every CSV under `directory` that has a `file` column.

    `ImageFinder` says which image a `file` is. Every value is text, and only an empty cell is
    missing. A CSV that cannot be parsed is named and skipped; rows that match no image, or
    several, are counted. A column named like one of ours gets the prefix `metadata_`.

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
    finder = ImageFinder([str(path) for path in images])
    tables = []
    for source in find_tables(directory):
        if source in skip:
            continue
        name = source.relative_to(directory).as_posix()
        try:
            table, files, _ = read_csv(source)
        except OSError as error:
            raise UserError(f"Cannot read the metadata file {name}: {error.strerror}.") from error
        except (ValueError, csv.Error) as error:
            notes.skip_table(name, str(error))
            continue
        tables.append(rows_by_image(table, files, PurePosixPath(name), finder, notes))
    if not tables:
        return pd.DataFrame(index=pd.Index([], name="path"))
    return one_row_each(pd.concat(tables), "The metadata describes")


def rows_by_image(
    table: pd.DataFrame, files: pd.Series, source: PurePosixPath, finder: ImageFinder, notes: Notes
) -> pd.DataFrame:
    """Return the rows that match one image, indexed by its `path`; note the others.

    Args:
        table: other columns of the CSV `source`.
        files: name in each of its rows.
        source: path of the CSV, relative to the raw data.
        finder: finder of all images.
        notes: where to note rows that match no image or several.
    """
    names = files.tolist()
    found = [finder.find(source.parent, name) for name in names]
    notes.match_rows(str(source), names, found, finder.example)
    table = table[[len(images) == 1 for images in found]]
    paths = [images[0] for images in found if len(images) == 1]
    return table.set_axis(pd.Index(paths, dtype=str, name="path"))


def one_row_each(table: pd.DataFrame, subject: str) -> pd.DataFrame:
    """Return one row for each path: the rows of one path put together.

    Args:
        table: rows, indexed by `path`.
        subject: start of the sentence that names what disagrees.

    Raises:
        UserError: two rows of one path differ in a cell that neither leaves empty.
    """
    if not table.index.has_duplicates:
        return table
    rows = table.groupby(level="path", sort=False)
    counts = rows.nunique()
    for column in map(str, counts.columns):
        disagreeing = counts.index[counts[column] > 1]
        if len(disagreeing):
            values = table[column][disagreeing[0]].dropna().unique()
            raise UserError(
                f"{subject} {len(disagreeing)} file(s) more than once and differently, such as "
                f"{disagreeing[0]!r}: its {column} is {' and '.join(map(repr, values[:5]))}. "
                "Keep one row for each file."
            )
    return rows.first()


def read_csv(
    source: Path, file_column: str = "file"
) -> tuple[pd.DataFrame, pd.Series, dict[str, str]]:
    """Read the rows that name a file, all as text, with the columns' names made unique.

    Commas, semicolons and tabs separate cells, whichever gives a header with the column of files.

    Args:
        source: CSV in UTF-8, or in UTF-16 with its mark, as Excel writes them.
        file_column: column that names the file, in any case.

    Returns:
        The other columns, the files that the rows name, and the columns' names by those of the
        header.

    Raises:
        MissingColumnError: the CSV has no such column.
        ValueError: the CSV has a longer row than its header, or another encoding.
        csv.Error: the CSV cannot be parsed.
    """
    with source.open("rb") as file:
        marked = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "utf-16" if marked else "utf-8-sig"
    delimiter, before, header = _find_header(source, encoding, file_column)
    names: list[str] = []
    for number, name in enumerate(header, 1):
        free = our_name(name or f"column_{number}")
        names.append(f"{free}.{number}" if free in names else free)
    rows = []
    try:
        with source.open(encoding=encoding, newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            for row in islice(reader, before, None):
                if any(row[len(names) :]):
                    raise ValueError(f"line {reader.line_num} has more cells than the header")
                rows.append(dict(zip(names, row, strict=False)))
    except UnicodeError as error:
        raise ValueError(f"it is not UTF-8 ({error}): save it as CSV UTF-8") from error
    table = pd.DataFrame(rows, columns=names, dtype="string").replace("", pd.NA)
    given = dict(zip(reversed(header), reversed(names), strict=True))
    empty = [
        name
        for name, called in zip(names, header, strict=True)
        if not called and table[name].isna().all()
    ]
    file_column = given[as_written(file_column, header)]
    table = table[table[file_column].notna()].drop(columns=empty)
    files = table.pop(file_column)
    return table, files, given


def _find_header(source: Path, encoding: str, column: str) -> tuple[str, int, list[str]]:
    """Return what separates the cells of a CSV, how many rows go before the data, and its header.

    Raises:
        MissingColumnError: no separator gives a header with the column.
    """
    for delimiter in _DELIMITERS:
        with source.open(encoding=encoding, errors="replace", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            first = next(reader, [])
            # "sep=;" in the first line tells Excel the separator.
            told = "".join(first).lower().startswith("sep=")
            header = [name.strip() for name in (next(reader, []) if told else first)]
            if as_written(column, header) in header:
                return delimiter, 1 + told, header
    start = ", ".join(first)[:80]
    raise MissingColumnError(f"it has no `{column}` column; it begins with {start!r}")


def as_written(column: str, header: Sequence[str]) -> str:
    """Return the name of a column as a header writes it, in any case if the same is not there."""
    same = (name for name in header if name.casefold() == column.casefold())
    return column if column in header else next(same, column)


def our_name(name: str) -> str:
    """Return the name of a metadata column, kept apart from those of manifests."""
    return f"metadata_{name}" if name in _OURS else name
