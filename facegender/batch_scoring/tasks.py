"""Work of one Spark task: decode the images of a part, score them with the model, write a file.

Spark holds only pixels at the model's size, so large files never pass through it.
"""

import io
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from facegender.batch_scoring.parquet import NamedImage, table_rows
from facegender.batch_scoring.plan import Job, part_name, read_part
from facegender.batch_scoring.storage import Storage
from facegender.data.face_images import box_of, face_images
from facegender.data.images import InvalidImage
from facegender.faces.settings import FaceCrop
from facegender.inference.prediction import map_ahead
from facegender.inference.predictor import NO_FACE

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

# Images in one message between Spark and Python.
MESSAGE_IMAGES = 64
# Objects that each task fetches at the same time; otherwise its core would mostly wait.
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
    crop: FaceCrop | None,
) -> "DataFrame":
    """Return a row of counts for each part in `todo`; collecting the rows scores the parts.

    Args:
        todo: numbers of the parts to score.
        size: side, in pixels, of the images that the model takes.
        crop: how faces are cut out of images; None scores whole images.
    """
    import mlflow
    from pyspark.sql import functions as F

    # MLflow warns that this environment differs from the one the model was trained in.
    logging.getLogger("mlflow.pyfunc").setLevel(logging.ERROR)
    # Only what differs from the defaults, because older models refuse parameters they do not know.
    params: dict[str, float | bool] = {}
    if job.abstain_below:
        params["abstain_below"] = job.abstain_below
    if crop:
        params["whole"] = True  # faces are cut out before the model runs
    predict = mlflow.pyfunc.spark_udf(
        session,
        str(model),
        result_type="label string, probability double",
        env_manager="local",
        params=params or None,
        # Each core runs a task of its own.
        extra_env={"OMP_NUM_THREADS": "1"},
    )
    # One Spark task per part.
    numbers = session.range(len(todo), numPartitions=len(todo))
    images = numbers.mapInArrow(
        lambda batches: _read(batches, job, source, target, todo, size, crop),
        "part long, image string, pixels binary, error string, box string, first boolean",
    )
    good = F.col("error").isNull() & F.col("box").isNotNull()
    rows = images.withColumn("predicted", predict(F.col("pixels"))).select(
        "part",
        "image",
        F.when(good, F.col("predicted.label")).alias("label"),
        F.when(good, F.col("predicted.probability")).alias("probability"),
        "error",
        "box",
        "first",
    )
    return rows.mapInArrow(
        lambda batches: _write(batches, target, crop is not None),
        "part long, images long, failed long",
    )


def _read(
    batches: Iterable["pa.RecordBatch"],
    job: Job,
    source: Storage,
    target: Storage,
    todo: Sequence[int],
    size: int,
    crop: FaceCrop | None,
) -> Iterator["pa.RecordBatch"]:
    """Yield the decoded images of parts, face by face, in the order of the plan."""
    import pyarrow as pa

    schema = pa.schema(
        {
            "part": pa.int64(),
            "image": pa.string(),
            "pixels": pa.binary(),
            "error": pa.string(),
            "box": pa.string(),
            "first": pa.bool_(),
        }
    )
    for index in itertools.chain.from_iterable(batch["id"].to_pylist() for batch in batches):
        part = read_part(target, todo[index])
        images = table_rows(*part) if job.table else _stored_images(source, part)
        rows = (
            (todo[index], _as_text(name), *face)
            for name, image in images
            for face in _decode(image, size, crop)
        )
        while chunk := list(itertools.islice(rows, MESSAGE_IMAGES)):
            columns = zip(*chunk, strict=True)
            arrays = [pa.array(*column) for column in zip(columns, schema.types, strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _decode(
    image: bytes | Path | InvalidImage, size: int, crop: FaceCrop | None
) -> list[tuple[bytes, str | None, str | None, bool]]:
    """Return a row for each face of an image; a whole image counts as one face.

    Returns:
        The pixels at the model's size as an uncompressed file; why the image cannot be read; the
        face's box as JSON, None without a face; whether it is the first of its image. Spark passes
        every row to the model, so a black image stands in for one that is not judged.
    """
    try:
        if isinstance(image, InvalidImage):
            raise image
        found = face_images(image, size, crop)
    except InvalidImage as error:
        return [(_black(size), _as_text(str(error)), None, True)]
    if crop and found[0][0] is None:
        return [(_black(size), None, None, True)]
    return [
        (_bmp(pixels), None, json.dumps(box_of(face) if face else {}), index == 0)
        for index, (face, pixels) in enumerate(found)
    ]


def _black(size: int) -> bytes:
    return _bmp(np.zeros((size, size, 3), np.uint8))


def _bmp(pixels: np.ndarray) -> bytes:
    """Return pixels as a BMP file, which is lossless and fast to write and read."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()


def _as_text(name: str) -> str:
    """Return a name as valid text, with escapes for bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _stored_images(source: Storage, names: Sequence[str]) -> Iterator[NamedImage]:
    def fetch(name: str) -> NamedImage:
        try:
            return source.address(name), source.photo(name)
        except InvalidImage as error:
            return source.address(name), error

    if source.is_local:
        return map(fetch, names)
    return map_ahead(fetch, names, threads=_FETCHES, ahead=_FETCHES)


def _write(
    batches: Iterable["pa.RecordBatch"], target: Storage, with_faces: bool
) -> Iterator["pa.RecordBatch"]:
    """Write the rows of the task's part, and yield its counts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_batches(batches)
    (part,) = set(table["part"].to_pylist())
    columns = ["image", "label", "probability", "error"]
    if with_faces:
        table = _one_row_an_image(table)
        columns.append("faces")
    table = table.select(columns)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    target.write(part_name(part), buffer.getvalue())
    failed = len(table) - table["error"].null_count
    yield pa.RecordBatch.from_pylist([{"part": part, "images": len(table), "failed": failed}])


def _one_row_an_image(table: "pa.Table") -> "pa.Table":
    """Return the rows of the first faces, with all faces of their image as JSON in `faces`."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    faces: list[list[dict[str, Any]]] = []
    for row in table.to_pylist():
        if row["first"]:
            rows.append(row)
            faces.append([])
        if row["box"] is not None:
            judged = {"label": row["label"], "probability": row["probability"]}
            faces[-1].append(json.loads(row["box"]) | judged)
        elif row["error"] is None:
            row["label"] = NO_FACE
    kept = pa.Table.from_pylist(rows, schema=table.schema)
    return kept.append_column("faces", pa.array(map(json.dumps, faces), pa.string()))
