"""What each Spark task does: decode the images of a part, have the model score them, write a file.

Spark holds only pixels at the model's size, so large files never pass through it.
"""

import io
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from facegender.batch_scoring.parquet import NamedImage, table_rows
from facegender.batch_scoring.plan import Job, part_name, read_part
from facegender.batch_scoring.storage import Storage
from facegender.data.images import InvalidImage, decode_image

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

# Images in one message between Spark and Python.
MESSAGE_IMAGES = 64
# Objects that each task fetches at the same time; its core would otherwise wait for most of them.
_FETCHES = 8


def scored_parts(
    session: "SparkSession",
    job: Job,
    source: Storage,
    target: Storage,
    *,
    todo: Sequence[int],
    model: Path,
    size: int,
) -> "DataFrame":
    """Return a row of counts for each part in `todo`; collecting the rows scores the parts.

    Args:
        session: Spark session.
        job: job of the output.
        source: folder of the images.
        target: folder of the output.
        todo: numbers of the parts to score.
        model: folder of the logged model.
        size: side, in pixels, of the images that the model takes.
    """
    import mlflow
    from pyspark.sql import functions as F

    # MLflow warns that this environment differs from the one the model was trained in.
    logging.getLogger("mlflow.pyfunc").setLevel(logging.ERROR)
    predict = mlflow.pyfunc.spark_udf(
        session,
        str(model),
        result_type="label string, probability double",
        env_manager="local",
        # Models of earlier versions refuse 0, which is also the default.
        params={"abstain_below": job.abstain_below} if job.abstain_below else None,
        # Each core runs a task of its own.
        extra_env={"OMP_NUM_THREADS": "1"},
    )
    # One Spark task per part.
    numbers = session.range(len(todo), numPartitions=len(todo))
    images = numbers.mapInArrow(
        lambda batches: _read(batches, job, source, target, todo, size),
        "part long, image string, pixels binary, error string",
    )
    good = F.col("error").isNull()
    rows = images.withColumn("predicted", predict(F.col("pixels"))).select(
        "part",
        "image",
        F.when(good, F.col("predicted.label")).alias("label"),
        F.when(good, F.col("predicted.probability")).alias("probability"),
        "error",
    )
    return rows.mapInArrow(
        lambda batches: _write(batches, target), "part long, images long, failed long"
    )


def _read(
    batches: Iterable["pa.RecordBatch"],
    job: Job,
    source: Storage,
    target: Storage,
    todo: Sequence[int],
    size: int,
) -> Iterator["pa.RecordBatch"]:
    """Yield the decoded images of parts, in the order of the plan."""
    import pyarrow as pa

    schema = pa.schema(
        {"part": pa.int64(), "image": pa.string(), "pixels": pa.binary(), "error": pa.string()}
    )
    for index in itertools.chain.from_iterable(batch["id"].to_pylist() for batch in batches):
        part = read_part(target, todo[index])
        images = table_rows(*part) if job.table else _stored_images(source, part)
        rows = ((todo[index], _as_text(name), *_decode(image, size)) for name, image in images)
        while chunk := list(itertools.islice(rows, MESSAGE_IMAGES)):
            columns = zip(*chunk, strict=True)
            arrays = [pa.array(*column) for column in zip(columns, schema.types, strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _decode(image: bytes | Path | InvalidImage, size: int) -> tuple[bytes, str | None]:
    """Return an image at the model's size as an uncompressed file, and why it cannot be read.

    Spark passes every row to the model, so a black image stands in for one that cannot be read.
    """
    try:
        if isinstance(image, InvalidImage):
            raise image
        return _bmp(decode_image(image, size)), None
    except InvalidImage as error:
        return _bmp(np.zeros((size, size, 3), np.uint8)), _as_text(str(error))


def _bmp(pixels: np.ndarray) -> bytes:
    """Return pixels as a BMP file, which is lossless and fast to write and read."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()


def _as_text(name: str) -> str:
    """Return a name as valid text: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _stored_images(source: Storage, names: Sequence[str]) -> Iterator[NamedImage]:
    def fetch(name: str) -> NamedImage:
        try:
            return source.address(name), source.photo(name)
        except InvalidImage as error:
            return source.address(name), error

    return map(fetch, names) if source.is_local else _prefetch(fetch, names)


def _prefetch(fetch: Callable[[str], NamedImage], names: Sequence[str]) -> Iterator[NamedImage]:
    """Fetch in threads, in order, at most `_FETCHES` images ahead of the reader."""
    left = iter(names)
    with ThreadPoolExecutor(_FETCHES) as pool:
        futures = deque(pool.submit(fetch, name) for name in itertools.islice(left, _FETCHES))
        while futures:
            image = futures.popleft().result()
            futures.extend(pool.submit(fetch, name) for name in itertools.islice(left, 1))
            yield image


def _write(batches: Iterable["pa.RecordBatch"], target: Storage) -> Iterator["pa.RecordBatch"]:
    """Write the rows of the task's part, and yield its counts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_batches(batches)
    (part,) = set(table["part"].to_pylist())
    buffer = io.BytesIO()
    pq.write_table(table.drop_columns("part"), buffer)
    target.write(part_name(part), buffer.getvalue())
    failed = len(table) - table["error"].null_count
    yield pa.RecordBatch.from_pylist([{"part": part, "images": len(table), "failed": failed}])
