"""Scoring: the labels of millions of images, by a registered model on Spark.

The images are divided into parts, and the division is written down first. A part is one task of
Spark's: it decodes the part's images as `predict` does, has MLflow's UDF of the model compute them,
and writes their rows as one file, by a rename. So a file is there whole or not at all, and a run
that was killed goes on with the parts that have none. What Spark holds of an image is its pixels,
as the model takes them: no large file ever passes through it.
"""

import io
import itertools
import json
import logging
import math
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from facegender.batch_scoring.storage import Folder, Place, place_of
from facegender.data.images import InvalidImage, decode_image
from facegender.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

_log = logging.getLogger(__name__)

# Images a file of the output: some ten seconds of one core.
PART_IMAGES = 1000

# Readers of Parquet pass over names that begin so.
_JOB = "_score/job.json"
_DONE = "_SUCCESS"
# Images of one message between Spark and Python.
_BATCH = 64
# Objects of S3 fetched at the same time by each task, whose core would wait for most of them.
_FETCHES = 8
_LOOK_SECONDS = 0.5
# A row group of Parquet is cut into no more parts than this, for each reads it from its start.
_CUTS = 8

# An image of a part: its name, and its bytes or path, or why they are not to be had.
_Named = tuple[str, bytes | Path | InvalidImage]


@dataclass(frozen=True)
class Job:
    """What an output holds when it is complete. It is written down before the first image is read.

    Attributes:
        source: absolute path or address of the images.
        table: whether they are in Parquet.
        model: address of the model, a version if it is a registered one.
        abstain_below: as in `prediction.label_of`.
        parts: number of files.
        images: in all of them.
    """

    source: str
    table: bool
    model: str
    abstain_below: float
    parts: int
    images: int


@dataclass(frozen=True)
class Scored:
    """What a run did.

    Attributes:
        images: in the complete output.
        now: of them, those that this run scored.
        failed: of these, those that could not be read.
    """

    images: int
    now: int
    failed: int


def check_spark() -> None:
    """Raise UserError if pyspark or Java is missing."""
    try:
        import pyarrow  # noqa: F401
        import pyspark  # noqa: F401
    except ImportError:
        raise UserError(
            "pyspark is missing, which `facegender score` runs on: `pip install "
            "'facegender[spark]'`, or `make install-scale`."
        ) from None
    home = os.environ.get("JAVA_HOME")
    if not shutil.which("java", path=str(Path(home, "bin")) if home else None):
        raise UserError(
            f"There is no Java {f'in JAVA_HOME, {home}' if home else 'on PATH'}, which Spark runs "
            "on: on Debian, `apt-get install openjdk-17-jre-headless`."
        )


def prepare(source: str, output: str, *, model: str, abstain_below: float, part_images: int) -> Job:
    """Return what is to be done: what `output` says that it is for, else written there now.

    Args:
        source: a folder of images, a Parquet file or a folder of them, or a prefix of S3.
        output: a folder or a prefix of S3, new or from a run that broke off.
        model: address of the model, a version if it is a registered one.
        abstain_below: as in `prediction.label_of`.
        part_images: images a file.

    Raises:
        UserError: there is no image, or `output` holds something else.
    """
    target = place_of(output)
    if isinstance(target, Folder) and Path(target.path).exists() and not Path(target.path).is_dir():
        raise UserError(f"OUTPUT exists: {output} is a file, where a new folder is expected.")
    images = place_of(source)
    where = images.path if isinstance(images, Folder) else source
    if (known := _known_job(target)) is not None:
        wanted = {"source": where, "model": model, "abstain_below": abstain_below}
        differs = [
            f"{key} {getattr(known, key)} there, {value} now"
            for key, value in wanted.items()
            if getattr(known, key) != value
        ]
        if differs:
            raise UserError(
                f"OUTPUT exists: {output} is of another job ({'; '.join(differs)}). Name another "
                "OUTPUT, or what that job was given, for it to go on."
            )
        return known
    if set(target.names()) - {"_score"}:
        raise UserError(
            f"OUTPUT exists: {output} is not empty, and no output of `facegender score`. Name a "
            "new one."
        )
    table, parts = _parts(images, where, part_images)
    number = count = 0
    for number, (size, part) in enumerate(parts, 1):
        target.write(_plan_name(number - 1), json.dumps(part).encode())
        count += size
    job = Job(where, table, model, abstain_below, number, count)
    target.write(_JOB, json.dumps(asdict(job), indent=2).encode())
    return job


def score(
    job: Job, source: str, output: str, *, model: Path, master: str, conf: Mapping[str, str]
) -> Scored:
    """Score what a job has left to do.

    Args:
        job: from `prepare`.
        source: what `prepare` was given.
        output: what `prepare` was given.
        model: folder of the model, as MLflow logged it.
        master: of Spark.
        conf: settings of Spark's, in place of those made here.

    Raises:
        UserError: Spark does not start, or does not finish. What is scored is kept.
    """
    target = place_of(output)
    there = set(target.names())
    todo = [number for number in range(job.parts) if _part_name(number) not in there]
    rows: list[Any] = []
    if todo:
        size = model_size(model)
        # In a thread of its own: this one is to hear of Ctrl-C, and Spark to be told.
        with ThreadPoolExecutor(1) as pool, _spark(master, conf) as session:
            frame = _scores(
                session, job, place_of(source), target, todo=todo, model=model, size=size
            )
            rows = _followed(pool.submit(frame.collect), session, total=len(todo))
    if _DONE not in there:
        target.write(_DONE, b"")
    return Scored(job.images, sum(row.images for row in rows), sum(row.failed for row in rows))


def model_size(model: Path) -> int:
    """Return the side, in pixels, of the images that a logged model takes.

    Raises:
        UserError: it is no model of this project, or damaged.
    """
    from mlflow.models import Model

    from facegender.inference.litert import load_litert, probe_litert

    try:
        artifact = Model.load(model).flavors["python_function"]["artifacts"]["model"]["path"]
    except KeyError:
        raise UserError(
            "The model is none that this project logs: its MLmodel names no LiteRT file. "
            "`facegender models` lists those that are registered."
        ) from None
    probe_litert(model / artifact)
    return load_litert(model / artifact).size


def _known_job(target: Place) -> Job | None:
    try:
        return Job(**json.loads(target.read(_JOB)))
    except FileNotFoundError:
        return None


def _part_name(number: int) -> str:
    return f"part-{number:06}.parquet"


def _plan_name(number: int) -> str:
    return f"_score/plan/{number:06}.json"


def _parts(images: Place, where: str, part_images: int) -> tuple[bool, Iterator[tuple[int, list]]]:
    """Return whether the images are in Parquet, and each part's number of images and contents."""
    tables: list[Path] = []
    if isinstance(images, Folder):
        path = Path(where)
        if not path.exists():
            raise UserError(f"There is no INPUT {images.written}.")
        tables = [path] if path.is_file() else []
    names = images.photos()
    first = next(names, None)
    if first is not None:
        chunks = _chunks(itertools.chain([first], names), part_images)
        return False, ((len(chunk), chunk) for chunk in chunks)
    if isinstance(images, Folder) and not tables:
        tables = [
            file
            for file in sorted(path.rglob("*.parquet"))
            if not any(part.startswith(("_", ".")) for part in file.relative_to(path).parts)
        ]
    parts = (part for table in tables for part in _slices(table, part_images))
    first_part = next(parts, None)
    if first_part is None:
        raise UserError(
            f"INPUT is empty: there is no image in {images.written}"
            f"{', and no row of Parquet' if isinstance(images, Folder) else ''}."
        )
    return True, itertools.chain([first_part], parts)


def _chunks(names: Iterator[str], size: int) -> Iterator[list[str]]:
    while chunk := list(itertools.islice(names, size)):
        yield chunk


def _slices(table: Path, part_images: int) -> Iterator[tuple[int, list]]:
    """Yield parts of a Parquet file: file, row group, its first row, and rows of it from and to."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(table)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{table} is no Parquet file that can be read: {_first_line(error)}."
        ) from None
    with file:
        _columns(file.schema_arrow, table)
        before = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            step = max(part_images, math.ceil(rows / _CUTS))
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                yield stop - start, [str(table), group, before, start, stop]
            before += rows


def _columns(schema: "pa.Schema", table: Path) -> tuple[str, str | None]:
    """Return the column of the images' bytes, and that of their names, if there is one.

    Fields of a struct count, by their full names (`image.bytes`, as Hugging Face writes them).
    """
    import pyarrow as pa

    leaves: dict[str, pa.DataType] = {}
    for field in schema:
        if pa.types.is_struct(field.type):
            leaves |= {f"{field.name}.{inner.name}": inner.type for inner in field.type}
        else:
            leaves[field.name] = field.type
    binary = [
        name
        for name, kind in leaves.items()
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    ]
    if len(binary) != 1:
        raise UserError(
            f"{table} has {len(binary)} columns of bytes ({', '.join(binary) or 'none'}), where "
            f"one is expected, of image files. Its columns: {', '.join(leaves)}."
        )
    beside = binary[0].rpartition(".")[0]
    for name in ("image", "path", f"{beside}.path"):
        kind = leaves.get(name)
        if kind is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            return binary[0], name
    return binary[0], None


def _scores(
    session: "SparkSession",
    job: Job,
    source: Place,
    target: Place,
    *,
    todo: Sequence[int],
    model: Path,
    size: int,
) -> "DataFrame":
    """Return a row for each part in `todo`, with its counts; collecting them scores the parts."""
    import mlflow
    from pyspark.sql import functions as F

    # It says that this environment is not the one that the model was trained in.
    logging.getLogger("mlflow.pyfunc").setLevel(logging.ERROR)
    predict = mlflow.pyfunc.spark_udf(
        session,
        str(model),
        result_type="label string, probability double",
        env_manager="local",
        params={"abstain_below": job.abstain_below},
        # Each core has a task of its own.
        extra_env={"OMP_NUM_THREADS": "1"},
    )
    # One task a part.
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
    source: Place,
    target: Place,
    todo: Sequence[int],
    size: int,
) -> Iterator["pa.RecordBatch"]:
    """Yield the decoded images of parts, in the order of the plan."""
    import pyarrow as pa

    schema = pa.schema(
        {"part": pa.int64(), "image": pa.string(), "pixels": pa.binary(), "error": pa.string()}
    )
    for place in itertools.chain.from_iterable(batch["id"].to_pylist() for batch in batches):
        part = json.loads(target.read(_plan_name(todo[place])))
        found = _table_rows(*part) if job.table else _photos(source, part)
        rows = ((todo[place], _text(name), *_decoded(image, size)) for name, image in found)
        while chunk := list(itertools.islice(rows, _BATCH)):
            columns = zip(*chunk, strict=True)
            arrays = [pa.array(*column) for column in zip(columns, schema.types, strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _decoded(image: bytes | Path | InvalidImage, size: int) -> tuple[bytes, str | None]:
    """Return an image's pixels as the model takes them, in a file without compression.

    Spark has the model compute every row, so a black image stands for one that cannot be read.
    """
    try:
        if isinstance(image, InvalidImage):
            raise image
        return _bmp(decode_image(image, size)), None
    except InvalidImage as error:
        return _bmp(np.zeros((size, size, 3), np.uint8)), _text(str(error))


def _bmp(pixels: np.ndarray) -> bytes:
    """Return pixels as a BMP file: quickly written and read, and the same when they are."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()


def _text(name: str) -> str:
    """Return a name as text that can be written: bytes of it that are none become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _photos(source: Place, names: Sequence[str]) -> Iterator[_Named]:
    def fetch(name: str) -> _Named:
        try:
            return source.address(name), source.photo(name)
        except InvalidImage as error:
            return source.address(name), error

    return map(fetch, names) if isinstance(source, Folder) else _ahead(fetch, names)


def _ahead(fetch: Callable[[str], _Named], names: Sequence[str]) -> Iterator[_Named]:
    """Fetch in threads, in order, and no more than is being fetched ahead of what is taken."""
    left = iter(names)
    with ThreadPoolExecutor(_FETCHES) as pool:
        futures = deque(pool.submit(fetch, name) for name in itertools.islice(left, _FETCHES))
        while futures:
            image = futures.popleft().result()
            futures.extend(pool.submit(fetch, name) for name in itertools.islice(left, 1))
            yield image


def _table_rows(table: str, group: int, before: int, start: int, stop: int) -> Iterator[_Named]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Without the buffering of a whole row group, of which a file may have one alone.
    with pq.ParquetFile(table, pre_buffer=False, buffer_size=1 << 20) as file:
        content, name = _columns(file.schema_arrow, Path(table))
        wanted = [column for column in (content, name) if column]
        row = 0
        for batch in file.iter_batches(_BATCH, row_groups=[group], columns=wanted):
            flat = pa.Table.from_batches([batch]).flatten()
            names = flat[name].to_pylist() if name else [None] * len(flat)
            for place in range(max(start - row, 0), min(stop - row, len(flat))):
                image = flat[content][place].as_py()
                yield (
                    names[place] or f"{table}#{before + row + place}",
                    InvalidImage("no such file: the row has no bytes") if image is None else image,
                )
            row += len(flat)
            if row >= stop:
                return


def _write(batches: Iterable["pa.RecordBatch"], target: Place) -> Iterator["pa.RecordBatch"]:
    """Write the rows of one part, which are the task's, and yield its counts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_batches(batches)
    (part,) = set(table["part"].to_pylist())
    buffer = io.BytesIO()
    pq.write_table(table.drop_columns("part"), buffer)
    target.write(_part_name(part), buffer.getvalue())
    failed = len(table) - table["error"].null_count
    yield pa.RecordBatch.from_pylist([{"part": part, "images": len(table), "failed": failed}])


@contextmanager
def _spark(master: str, conf: Mapping[str, str]) -> Iterator["SparkSession"]:
    """Give a session, whose log is a file that is kept if it fails."""
    from py4j.protocol import Py4JError
    from pyspark import SparkConf, SparkContext
    from pyspark.errors import PySparkException
    from pyspark.java_gateway import launch_gateway
    from pyspark.sql import SparkSession

    settings = {
        "spark.master": master,
        "spark.app.name": "facegender score",
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(_BATCH),
        "spark.ui.showConsoleProgress": "false",
    }
    if master.startswith("local"):
        # Nobody else is to reach it.
        own = {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
        settings |= own | {"spark.ui.enabled": "false"}
    configured = SparkConf(loadDefaults=False).setAll(list({**settings, **conf}.items()))
    descriptor, log = tempfile.mkstemp(prefix="facegender-score-", suffix=".log")
    keep, session, gateway = False, None, None
    try:
        # What Java prints is for whoever looks for the cause of a failure.
        with open(descriptor, "w") as output:  # noqa: PTH123 - a descriptor has no path
            gateway = launch_gateway(configured, {"stdout": output, "stderr": output})
        session = SparkSession(SparkContext(conf=configured, gateway=gateway))
        yield session
    except (Py4JError, PySparkException) as error:
        keep = True
        raise UserError(
            f"Spark does not {'start' if session is None else 'finish'}: {_cause(str(error))}. "
            f"What is scored is kept, and the same command goes on. Spark's log: {log}"
        ) from None
    except BaseException:
        _log.warning("what is scored is kept: `facegender score` as before goes on with the rest")
        raise
    finally:
        if session is not None:
            with suppress(Exception):  # it may have been what failed
                session.stop()
        if gateway is not None:
            # It would end with this process; here, so that its files are gone before.
            gateway.proc.terminate()
            gateway.proc.wait()
        if not keep:
            Path(log).unlink()


def _cause(text: str) -> str:
    """Return what a worker's traceback ends in, or else the first line of Spark's message."""
    lines = text.partition("Traceback (most recent call last):")[2].splitlines()
    for line in lines[1:]:
        if line and not line.startswith((" ", "\t")):
            return line.rstrip(".")
    return _first_line(text)


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _followed(rows: "Future[list]", session: "SparkSession", *, total: int) -> list:
    """Wait for Spark's answer and return it; on a terminal, show how many parts are done."""
    tracker = session.sparkContext.statusTracker()
    with tqdm(total=total, unit="file", leave=False, disable=not sys.stderr.isatty()) as bar:
        while not wait([rows], timeout=_LOOK_SECONDS).done:
            stages = map(tracker.getStageInfo, tracker.getActiveStageIds())
            bar.update(sum(stage.numCompletedTasks for stage in stages if stage) - bar.n)
    return rows.result()
