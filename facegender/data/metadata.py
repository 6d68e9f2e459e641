"""Metadata of images, from CSV files."""

import codecs
import csv
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import islice, product
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from facegender.data.image_files import find_tables
from facegender.data.image_finder import ImageFinder
from facegender.data.labelling_notes import Notes
from facegender.data.manifest import COLUMNS
from facegender.errors import UserError

# Columns that this project gives its own meaning, in manifests and predictions.
_OURS = {*COLUMNS, "row", "probability", "predicted"}
_DELIMITERS = (",", ";", "\t")


class MissingColumnError(ValueError):
    """A CSV lacks a column."""


def read_metadata(
    directory: Path,
    images: Sequence[PurePosixPath],
    notes: Notes,
    *,
    skip: Container[Path],
    unused: Mapping[Path, Sequence[str]],
) -> pd.DataFrame:
    """Collect the columns of every CSV under `directory` that has a `file` column.

    `ImageFinder` finds the image of a `file`. Every value is text, and only an empty cell is
    missing. A CSV that cannot be parsed is skipped and named; rows that match no image, or several,
    are counted. A column with a name of ours gets the prefix `metadata_`.

    Args:
        images: all images, relative to `directory`.
        notes: where to note CSVs that are skipped, and rows that match no image.
        skip: CSVs that give labels.
        unused: columns that are not metadata, by CSV; these CSVs may lack a `file` column.

    Returns:
        A frame indexed by the image's path relative to `directory`; empty if there is no CSV.

    Raises:
        UserError: two rows of one image disagree, or a CSV cannot be opened.
    """
    finder = ImageFinder([str(path) for path in images], notes.excluded)
    tables = {}
    for source in find_tables(directory):
        if source in skip:
            continue
        name = source.relative_to(directory).as_posix()
        try:
            table, files, _ = read_csv(source, unused=unused.get(source, ()))
        except OSError as error:
            raise UserError(f"Cannot read the metadata file {name}: {error.strerror}.") from error
        except (ValueError, csv.Error) as error:
            if source not in unused:  # tables of boxes need no `file` column
                notes.skip_table(name, str(error))
            continue
        tables[name] = rows_by_image(table, files, PurePosixPath(name), finder, notes)
    if not tables:
        return pd.DataFrame(index=pd.Index([], name="path"))
    return one_row_each(pd.concat(tables, names=["table"]))


def rows_by_image(
    table: pd.DataFrame, files: pd.Series, source: PurePosixPath, finder: ImageFinder, notes: Notes
) -> pd.DataFrame:
    """Return the rows that match exactly one image, indexed by its `path`; note the others.

    Args:
        table: other columns of the CSV `source`.
        files: name of the image in each row.
        source: path of the CSV, relative to the raw data.
        notes: where to note rows that match no image or several.
    """
    names = files.tolist()
    found = [finder.find(source.parent, name) for name in names]
    notes.match_rows(str(source), names, found, finder.example)
    table = table.loc[[len(images) == 1 for images in found]]
    paths = [images[0] for images in found if len(images) == 1]
    return table.set_axis(pd.Index(paths, dtype=str, name="path"))


def one_row_each(table: pd.DataFrame) -> pd.DataFrame:
    """Merge the rows of each path into one, indexed by `path`.

    Args:
        table: rows, indexed by `table`, the name of their CSV, and `path`.

    Raises:
        UserError: two rows of one path differ in a cell that neither leaves empty.
    """
    rows = table.groupby(level="path", sort=False)
    if len(rows) == len(table):
        return table.droplevel("table")
    counts = rows.nunique()
    for column in map(str, counts.columns):
        disagreeing = counts.index[counts[column] > 1]
        if len(disagreeing):
            cells = table[column].xs(disagreeing[0], level="path").dropna().drop_duplicates()
            values = (f"{value!r} in {source}" for source, value in cells.head(5).items())
            raise UserError(
                f"{len(disagreeing)} image(s) have rows that disagree, such as "
                f"{disagreeing[0]!r}: its {column} is {' and '.join(values)}. Keep one row for "
                "each image."
            )
    return rows.first()


def read_csv(
    source: Path, file_column: str = "file", unused: Sequence[str] = ()
) -> tuple[pd.DataFrame, pd.Series, dict[str, str]]:
    """Read the rows that are not empty, all cells as text, with unique names of columns.

    Cells are separated by commas, semicolons or tabs, whichever gives a header with `file_column`.
    They are tidied (`tidy_cells`), except those that name a file.

    Args:
        source: CSV in UTF-8, or in UTF-16 with a byte order mark, as Excel writes them.
        file_column: column that names the file, in any case.
        unused: columns to leave out, in any case.

    Returns:
        The other columns, the files that the rows name (empty where they name none), and the
        columns' names by those of the header.

    Raises:
        MissingColumnError: the CSV has no such column.
        ValueError: a row is longer than the header, a quote is not closed, or the encoding is
            another one.
        csv.Error: the CSV cannot be parsed.
    """
    with source.open("rb") as file:
        marked = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "utf-16" if marked else "utf-8-sig"
    dialect, before, header = _find_header(source, encoding, file_column)
    names: list[str] = []
    for number, name in enumerate(header, 1):
        free = our_name(name or f"column_{number}")
        names.append(f"{free}.{number}" if free in names else free)
    rows = []
    try:
        with source.open(encoding=encoding, newline="") as file:
            for line, row in islice(_read_rows(file, dialect), before, None):
                if any(row[len(names) :]):
                    raise ValueError(f"line {line} has more cells than the header")
                rows.append(dict(zip(names, row, strict=False)))
    except UnicodeError as error:
        raise ValueError(f"it is not UTF-8 ({error}): save it as CSV UTF-8") from error
    table = pd.DataFrame(rows, columns=names, dtype="string")
    given = dict(zip(reversed(header), reversed(names), strict=True))
    # A row may end before the column of files.
    files = table.pop(given[as_written(file_column, header)]).fillna("")
    left_out = [given.get(as_written(column, header)) for column in unused]
    table = tidy_cells(table.drop(columns=left_out, errors="ignore"))
    empty = [
        name
        for name, called in zip(names, header, strict=True)
        if not called and name in table and table[name].isna().all()
    ]
    filled = (files.str.strip() != "") | table.notna().any(axis=1)
    return table[filled].drop(columns=empty), files[filled], given


def tidy_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of text in which cells that look alike are equal.

    Spaces at the ends are removed, Unicode is composed (NFC), and an empty cell is missing.
    """
    tidied = {str(name): cells.str.strip().str.normalize("NFC") for name, cells in table.items()}
    return table.assign(**tidied).replace("", pd.NA)


def _read_rows(file: Iterable[str], dialect: dict[str, Any]) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the last line, and the cells, of each row of a CSV.

    Raises:
        ValueError: a quote is not closed, so that a cell would hold the rows that follow.
    """
    lines: list[str] = []

    def remembered() -> Iterator[str]:
        for line in file:
            lines.append(line)
            yield line

    reader = csv.reader(remembered(), **dialect)
    for row in reader:
        # A row of several lines, or the last line without its end.
        if len(lines) > 1 or not lines[-1].endswith(("\n", "\r")):
            try:
                list(csv.reader(lines, strict=True, **dialect))
            except csv.Error as error:
                first = reader.line_num - len(lines) + 1
                raise ValueError(f"a quote in line {first} is not closed ({error})") from error
        lines.clear()
        yield reader.line_num, row


def _find_header(source: Path, encoding: str, column: str) -> tuple[dict[str, Any], int, list[str]]:
    """Return a CSV's dialect, the number of rows before the data, and the header.

    Raises:
        MissingColumnError: no dialect gives a header with the column.
    """
    for delimiter, spaced in product(_DELIMITERS, (False, True)):
        dialect: dict[str, Any] = {"delimiter": delimiter, "skipinitialspace": spaced}
        with source.open(encoding=encoding, errors="replace", newline="") as file:
            reader = csv.reader(file, **dialect)
            first = next(reader, [])
            # A first line such as "sep=;" is for Excel.
            for_excel = "".join(first).lower().startswith("sep=")
            written = next(reader, []) if for_excel else first
            if len(written) > 1 and all(name.startswith(" ") for name in written[1:]):
                continue  # a space follows each separator, and quotes may follow the space
            header = [name.strip() for name in written]
            if as_written(column, header) in header:
                return dialect, 1 + for_excel, header
    start = ", ".join(first)[:80]
    raise MissingColumnError(f"it has no `{column}` column; it begins with {start!r}")


def as_written(column: str, header: Sequence[str]) -> str:
    """Return a column's name as the header spells it: preferably as given, else in any case."""
    same = (name for name in header if name.casefold() == column.casefold())
    return column if column in header else next(same, column)


def our_name(name: str) -> str:
    """Return the name of a metadata column, with a prefix if manifests have one of that name."""
    return f"metadata_{name}" if name in _OURS else name
