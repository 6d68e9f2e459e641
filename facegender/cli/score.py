"""`facegender score`."""

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

from facegender.cli.arguments import probability, setting, whole_number
from facegender.cli.registry import open_registry


def add_score(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Label all images of INPUT with a registered model on Spark, and write OUTPUT: a folder of "
        "Parquet files with the columns image, label, probability (of the label male), error and, "
        "if the model judges faces, faces. An image that cannot be read is a row with the reason, "
        "and the exit code is still 0; a folder that cannot be read ends the run. If a run fails "
        "or is killed, the same command resumes it, and each image is in OUTPUT once. Needs Java "
        "and the extra `spark` (docs/scaling-score.md)."
    )
    parser.add_argument(
        "input",
        metavar="INPUT",
        help="a folder (searched recursively), a Parquet file or folder of them with one column of "
        "image bytes, or s3://BUCKET/PREFIX",
    )
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        help="a new folder or s3://BUCKET/PREFIX, or that of a run to resume",
    )
    parser.add_argument(
        "--model",
        metavar="URI",
        default="models:/facegender@champion",
        help="MLflow model (default: models:/facegender@champion)",
    )
    parser.add_argument(
        "--abstain-below",
        type=probability,
        default=0.0,
        metavar="P",
        help="same as for `facegender predict`",
    )
    parser.add_argument(
        "--master",
        metavar="URL",
        default="local[*]",
        help="Spark master: the cores of this machine (default: local[*]), or a cluster, such as "
        "spark://HOST:PORT or yarn",
    )
    parser.add_argument(
        "--conf",
        action="append",
        type=setting,
        default=[],
        metavar="KEY=VALUE",
        help="Spark setting, as for `spark-submit`; may be repeated",
    )
    parser.add_argument(
        "--part-images",
        type=whole_number,
        default=1000,
        metavar="N",
        help="images in each file of OUTPUT; one core scores a file, and starts it again after a "
        "kill (default: 1000). A resumed run keeps its first value",
    )
    parser.set_defaults(run=score_command)


def score_command(args: argparse.Namespace) -> int:
    """Score the images that OUTPUT does not have yet."""
    from facegender.batch_scoring.plan import prepare
    from facegender.batch_scoring.score import model_input, score
    from facegender.batch_scoring.spark_session import check_spark
    from facegender.batch_scoring.storage import storage_errors_as_user_errors

    # Spark warns that it does not know pandas 3; the tests show that what is used here works.
    warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas")
    check_spark()
    # Spark's workers run in this environment.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
        with open_registry() as (registry, _):
            import mlflow

            model = registry.pin_version(args.model)
            local = Path(mlflow.artifacts.download_artifacts(artifact_uri=model, dst_path=folder))
        size, crop = model_input(local)  # before OUTPUT is bound to the model
        with storage_errors_as_user_errors():
            job = prepare(
                args.input,
                args.output,
                model=model,
                abstain_below=args.abstain_below,
                part_images=args.part_images,
            )
            done = score(
                job,
                args.output,
                model=local,
                size=size,
                crop=crop,
                master=args.master,
                conf=dict(args.conf),
            )
    before = f", {done.images - done.now:,} of them from before" if done.now < done.images else ""
    # The rows from before were counted then.
    now = f" of the other {done.now:,}" if before else ""
    failed = f"; {done.failed:,}{now} could not be read: column error" if done.failed else ""
    print(f"{args.output}: {done.images:,} images{before}, by {model}{failed}")
    return 0
