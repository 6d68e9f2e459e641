"""Images stored as rows of Parquet files."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from facegender.batch_scoring.storage import open_file
from facegender.data.images import InvalidImage
from facegender.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

# The name of an image, and its bytes, its path, or the reason why it cannot be read.
NamedImage = tuple[str, bytes | Path | InvalidImage]

# Slices of a row group. Each one reads the row group from its start.
_MAX_SLICES = 8
# Rows read at a time.
_BATCH = 64


def slices(table: str, part_images: int) -> Iterator[tuple[int, list]]:
    """Yield the slices of a Parquet file.

    Args:
        table: path or address of the file.
        part_images: images in a slice; large row groups have more.

    Yields:
        The number of images, and the arguments of `table_rows`.

    Raises:
        UserError: the file cannot be read, or does not have exactly one column of bytes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_file(table) as content:
        try:
            file = pq.ParquetFile(content)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UserError(f"{table} is not a readable Parquet file: {reason}.") from None
        with file:
            _image_columns(file.schema_arrow, table)
            before = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                step = max(part_images, math.ceil(rows / _MAX_SLICES))
                for start in range(0, rows, step):
                    stop = min(start + step, rows)
                    yield stop - start, [table, group, before, start, stop]
                before += rows


def table_rows(table: str, group: int, before: int, start: int, stop: int) -> Iterator[NamedImage]:
    """Yield the images of a slice.

    Args:
        table: path or address of the file.
        group: index of the row group.
        before: number of rows in earlier row groups.
        start: first row of the slice within the row group.
        stop: row after the last.

    Raises:
        UserError: the file has changed since the job was planned.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Unbuffered, because a file may consist of a single row group.
    with (
        open_file(table) as content,
        pq.ParquetFile(content, pre_buffer=False, buffer_size=1 << 20) as file,
    ):
        image_column, name_column = _image_columns(file.schema_arrow, table)
        if group >= file.num_row_groups or stop > file.metadata.row_group(group).num_rows:
            raise UserError(
                f"{table} has fewer rows than this job was planned with: name another OUTPUT."
            )
        columns = [column for column in (image_column, name_column) if column]
        row = 0
        for batch in file.iter_batches(_BATCH, row_groups=[group], columns=columns):
            flat = pa.Table.from_batches([batch]).flatten()
            names = flat[name_column].to_pylist() if name_column else [None] * len(flat)
            for index in range(max(start - row, 0), min(stop - row, len(flat))):
                image = flat[image_column][index].as_py()
                yield (
                    names[index] or f"{table}#{before + row + index}",
                    InvalidImage("no such file: the row has no bytes") if image is None else image,
                )
            row += len(flat)
            if row >= stop:
                return


def _image_columns(schema: "pa.Schema", table: str) -> tuple[str, str | None]:
    """Return the column of image bytes, and the column of names, if any.

    Fields of a struct count, by their full names (`image.bytes`, as Hugging Face writes them).
    """
    import pyarrow as pa

    leaves: dict[str, pa.DataType] = {}
    for field in schema:
        if pa.types.is_struct(field.type):
            leaves |= {f"{field.name}.{inner.name}": inner.type for inner in field.type}
        elif pa.types.is_dictionary(field.type):  # a categorical column of pandas
            leaves[field.name] = field.type.value_type
        else:
            leaves[field.name] = field.type
    bytes_types = {pa.binary(), pa.large_binary(), pa.binary_view()}
    binary = [name for name, kind in leaves.items() if kind in bytes_types]
    if len(binary) != 1:
        raise UserError(
            f"{table} has {len(binary)} columns of bytes ({', '.join(binary) or 'none'}); exactly "
            f"one, of image files, is expected. Its columns: {', '.join(leaves)}."
        )
    struct = binary[0].rpartition(".")[0]
    for name in ("image", "path", f"{struct}.path"):
        if leaves.get(name) in {pa.string(), pa.large_string(), pa.string_view()}:
            return binary[0], name
    return binary[0], None
