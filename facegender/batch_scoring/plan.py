"""The plan of a scoring job: which images are in which file of the output.

The images are divided into parts, and the plan is written first. Each part is one Spark task, which
writes one file atomically. After a kill, the next run scores the parts whose files are missing.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from facegender.batch_scoring.parquet import slices
from facegender.batch_scoring.storage import Storage, storage_of
from facegender.errors import UserError

# Readers of Parquet skip names that start with an underscore.
_JOB = "_score/job.json"


@dataclass(frozen=True)
class Job:
    """The contents of a complete output, recorded before the first image is read.

    Attributes:
        source: absolute path or address of the images.
        table: whether the images are in Parquet.
        model: address of the model, with its version if it is registered.
        abstain_below: as in `predictor.label_of`.
        parts: number of files.
        images: number of images in all files.
        written: INPUT as it was first given, which image names start with.
    """

    source: str
    table: bool
    model: str
    abstain_below: float
    parts: int
    images: int
    written: str = field(default="", compare=False)  # missing in the first plans


def prepare(source: str, output: str, *, model: str, abstain_below: float, part_images: int) -> Job:
    """Return the job of an output: the one it was started with, or a new one, written there now.

    Args:
        source: folder of images, Parquet file or folder of them, local or in object storage.
        output: folder, new or of an interrupted run, local or in object storage.
        model: address of the model, with its version if it is registered.
        abstain_below: as in `predictor.label_of`.
        part_images: images per file.

    Raises:
        UserError: the source has no images, or the output holds something else.
    """
    target = storage_of(output)
    if target.is_local and Path(target.root).exists() and not Path(target.root).is_dir():
        raise UserError(f"OUTPUT exists: {output} is a file, where a new folder is expected.")
    images = storage_of(source)
    wanted = {"source": images.url, "model": model, "abstain_below": abstain_below}
    if (known := _read_job(target)) is not None:
        found = asdict(known) | {"source": storage_of(known.source).url}
        differences = [
            f"{key} {found[key]} there, {value} now"
            for key, value in wanted.items()
            if found[key] != value
        ]
        if differences:
            raise UserError(
                f"OUTPUT exists: {output} belongs to another job ({'; '.join(differences)}). Name "
                "another OUTPUT, or repeat what that job was given to resume it."
            )
        return replace(known, written=known.written or images.written)
    if set(target.names()) - {"_score"}:
        raise UserError(
            f"OUTPUT exists: {output} is not empty, and not an output of `facegender score`. Name "
            "a new folder."
        )
    table, parts = _parts(images, part_images)
    number = count = 0
    for number, (size, part) in enumerate(parts, 1):
        target.write(_plan_name(number - 1), json.dumps(part).encode())
        count += size
    where = images.root if images.is_local else images.written
    job = Job(where, table, model, abstain_below, number, count, images.written)
    target.write(_JOB, json.dumps(asdict(job), indent=2).encode())
    return job


def read_part(target: Storage, number: int) -> list:
    """Return a part of the plan: names of photos, or the arguments of `parquet.table_rows`."""
    return json.loads(target.read(_plan_name(number)))


def part_name(number: int) -> str:
    """Return the name of a part's file in the output."""
    return f"part-{number:06}.parquet"


def _plan_name(number: int) -> str:
    return f"_score/plan/{number:06}.json"


def _read_job(target: Storage) -> Job | None:
    try:
        return Job(**json.loads(target.read(_JOB)))
    except FileNotFoundError:
        return None


def _parts(images: Storage, part_images: int) -> tuple[bool, Iterator[tuple[int, list]]]:
    """Return whether the images are in Parquet, and each part's number of images and contents."""
    if images.is_local and not Path(images.root).exists():
        raise UserError(f"There is no INPUT {images.written}.")
    names = images.photos()
    first = next(names, None)
    if first is not None:
        chunks = _chunks(itertools.chain([first], names), part_images)
        return False, ((len(chunk), chunk) for chunk in chunks)
    parts = (part for table in images.tables() for part in slices(table, part_images))
    first_part = next(parts, None)
    if first_part is None:
        raise UserError(
            f"INPUT is empty: there is no image in {images.written}, and no row of Parquet."
        )
    return True, itertools.chain([first_part], parts)


def _chunks(names: Iterator[str], size: int) -> Iterator[list[str]]:
    while chunk := list(itertools.islice(names, size)):
        yield chunk
