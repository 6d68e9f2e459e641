"""Label millions of images with a registered model on Spark."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from facegender.batch_scoring.plan import Job, part_name
from facegender.batch_scoring.spark_session import spark_session, wait_with_progress
from facegender.batch_scoring.storage import storage_of
from facegender.batch_scoring.tasks import scored_parts
from facegender.errors import UserError
from facegender.faces.settings import FaceCrop

_DONE = "_SUCCESS"


@dataclass(frozen=True)
class Scored:
    """Counts of a run.

    Attributes:
        images: number of images in the complete output.
        now: number of images that this run scored.
        failed: number of images that this run could not read.
    """

    images: int
    now: int
    failed: int


def score(
    job: Job,
    output: str,
    *,
    model: Path,
    size: int,
    crop: FaceCrop | None,
    master: str,
    conf: Mapping[str, str],
) -> Scored:
    """Score the parts of a job whose files are missing.

    Args:
        model: folder of the model, as MLflow logged it.
        size: side, in pixels, of the images that the model takes.
        crop: how faces are cut out of images; None scores whole images.
        conf: Spark settings that override those made here.

    Raises:
        UserError: Spark does not start or does not finish. Scored images are kept.
    """
    target = storage_of(output)
    # An input has several forms; a resumed run uses the one in the output's image names.
    images = storage_of(job.source)
    if images.is_local:
        images = replace(images, written=job.written)
    done = set(target.names())
    todo = [number for number in range(job.parts) if part_name(number) not in done]
    rows: list[Any] = []
    if todo:
        # Spark blocks another thread, so that this one receives Ctrl-C.
        with ThreadPoolExecutor(1) as pool, spark_session(master, conf) as session:
            frame = scored_parts(
                session, job, images, target, todo=todo, model=model, size=size, crop=crop
            )
            rows = wait_with_progress(pool.submit(frame.collect), session, total=len(todo))
    if _DONE not in done:
        target.write(_DONE, b"")
    return Scored(job.images, sum(row.images for row in rows), sum(row.failed for row in rows))


def model_input(model: Path) -> tuple[int, FaceCrop | None]:
    """Return the side, in pixels, of the images that a logged model takes, and its crop.

    Raises:
        UserError: the model is damaged, lost, or another project's.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    from facegender.inference.litert import load_litert, probe_litert

    try:
        artifact = Model.load(model).flavors["python_function"]["artifacts"]["model"]["path"]
    except (KeyError, MlflowException):
        raise UserError(
            "This project did not log the model, or its files are lost: it has no MLmodel that "
            "names a LiteRT file. `facegender models` lists the registered ones."
        ) from None
    probe_litert(model / artifact)
    predictor = load_litert(model / artifact)
    return predictor.size, predictor.crop
