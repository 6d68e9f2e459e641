"""Log inputs, metrics, files and the model to MLflow."""

import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import pandas as pd
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import LoggedModel, LoggedModelStatus, Run
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from facegender.errors import UserError
from facegender.files import file_sha256
from facegender.labels import LABELS
from facegender.tracking.connection import (
    drop_log_on_failure,
    find_run_by_id,
    short_error,
    skip_if_server_failed,
    user_tag,
)

_log = logging.getLogger(__name__)
MODEL_NAME = "model"
MODEL_DIGEST = "facegender.model_sha256"
_PACKAGES = ("keras", "mlflow", "numpy", "pillow", "scikit-learn", "tensorflow")
# What `serving` imports; not TensorFlow.
_SERVING_PACKAGES = ("ai-edge-litert", "mlflow", "numpy", "pandas", "pillow", "pillow-heif")


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide a result."""
    return {package: version(package) for package in _PACKAGES}


@skip_if_server_failed
def log_inputs(params: Mapping[str, Any], manifests: Mapping[str, Path]) -> None:
    """Log parameters and datasets to the open run."""
    mlflow.log_params(dict(params))
    _log_datasets(manifests)


def _log_datasets(manifests: Mapping[str, Path]) -> None:
    for split, path in manifests.items():
        # As `facegender.data.manifest.read_manifest` reads it: NA and 007 are text.
        frame = pd.read_csv(
            path, dtype="string", keep_default_na=False, na_values=[""], lineterminator="\n"
        )
        names = {str(value): name for name, value in LABELS.items()}
        frame["label"] = frame["label"].map(names).astype("string")
        dataset = from_pandas(
            frame,
            source=f"data/splits/{path.name}",
            targets="label",
            name=split,
            digest=file_sha256(path)[:32],
        )
        mlflow.log_input(dataset, context=split)


@skip_if_server_failed
def set_tags(tags: Mapping[str, str], stale: Collection[str] = ()) -> None:
    """Set tags of the open run, and delete stale ones."""
    mlflow.set_tags(dict(tags))
    for tag in stale:
        mlflow.delete_tag(tag)


@skip_if_server_failed
def log_epoch(epoch: int, metrics: Mapping[str, float], ended: int | None = None) -> None:
    """Log an epoch's metrics to the open run during training.

    Args:
        epoch: number of the epoch, from 1.
        ended: end of the epoch in milliseconds since 1970; None is now. MLflow drops a metric that
            equals another in everything, so an epoch logged again with its time appears once.
    """
    mlflow.log_metrics(dict(metrics), step=epoch, timestamp=ended)


def log_history(history: pd.DataFrame) -> None:
    """Log a finished training's metrics, one row per epoch, to the open run."""
    for row in history.to_dict("records"):
        epoch = int(row.pop("epoch"))
        row.pop("kept", None)  # logged by `log_results`
        log_epoch(epoch, {str(key): value for key, value in row.items()})


def log_results(
    test: Mapping[str, Any],
    *,
    robustness: pd.DataFrame,
    export: Mapping[str, Any],
    history: pd.DataFrame,
    model_id: str | None = None,
) -> None:
    """Log the metrics of a finished pipeline to the open run.

    Args:
        test: test metrics, logged as `test_` and their names.
        robustness: accuracy by change of the test pictures.
        export: metrics of the export, with the calibration.
        history: metrics, one row per epoch; the kept epoch and its validation loss are logged.
        model_id: logged model to link the metrics of the test split to, if any.
    """
    accuracies = robustness.set_index("change")["accuracy"].to_dict()
    log_numbers("test", test, model_id)
    log_numbers("robustness", {"accuracy": accuracies}, model_id)
    for row in history[history["kept"] == 1].itertuples():
        log_numbers("kept", {"epoch": row.epoch, "val_loss": row.val_loss})
    log_numbers("calibration", export["calibration"])
    log_numbers("export", export)


@skip_if_server_failed
def log_files(test_manifest: Path, *, metrics: Sequence[Path], models: Sequence[Path] = ()) -> None:
    """Log the test dataset, and files under `metrics` and `export`, to the open run."""
    _log_datasets({"test": test_manifest})
    for path in metrics:
        if path.is_dir():
            mlflow.log_artifacts(str(path), f"metrics/{path.name}")
        else:
            mlflow.log_artifact(str(path), "metrics")
    for path in models:
        mlflow.log_artifact(str(path), "export")


def log_report(run_id: str, files: Sequence[Path], *, loss: float, folder: str | None) -> str:
    """Log pages about a run to it, and change nothing else.

    Args:
        loss: test loss that the pages report; shows that they are about this run.
        folder: artifact folder for the pages, or None for the top.

    Returns:
        A sentence that says where they were logged. They are not if this store does not have the
        run, or the run holds other results.
    """
    run = find_run_by_id(run_id)
    if run is None:
        return "not logged: this store has no run with the model's evaluation"
    if run.data.metrics.get("test_loss") != loss:
        return f"not logged: MLflow run {run_id} holds other results; `dvc repro` updates both"
    client = mlflow.MlflowClient()
    with drop_log_on_failure():
        for path in files:
            client.log_artifact(run_id, str(path), folder)
        return f"logged to MLflow run {run_id}, which holds the evaluation"
    return "not logged: the server failed"


@skip_if_server_failed
def log_numbers(prefix: str, metrics: Mapping[str, Any], model_id: str | None = None) -> None:
    """Log every number in a metrics file to the open run, as `<prefix>_` and its dotted name."""
    numbers = {f"{prefix}_{name}": value for name, value in _numbers(metrics)}
    mlflow.log_metrics(numbers, model_id=model_id)


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield prefix + name, value


@skip_if_server_failed
def log_model(
    model: Path, *, code: Path, threshold: float, input_example: Any, packages: Sequence[str] = ()
) -> str:
    """Log an exported model to the open run as a `pyfunc` model that takes image bytes or arrays.

    The model carries this package's code, so it loads where facegender is not installed, and no
    pickle. Nothing is logged if the run already has the same model with its files.

    Args:
        code: directory of the package.
        input_example: input that `serving` accepts, shown with the model.
        packages: packages that it needs beyond those of every model.

    Returns:
        The id of the logged model.
    """
    run = mlflow.active_run()
    assert run is not None, "log_model needs an open run"  # noqa: S101 - a bug, not bad input
    digest = file_sha256(model)
    for logged in logged_models(run):
        if logged.tags.get(MODEL_DIGEST) == digest and not is_lost(logged.model_uri):
            return logged.model_id
    with TemporaryDirectory() as folder:
        # MLflow refuses links, and DVC may have linked the model from its cache.
        copied = shutil.copy(model, folder)
        return mlflow.pyfunc.log_model(
            name=MODEL_NAME,
            python_model=str(code / "inference" / "serving.py"),
            artifacts={"model": str(copied)},
            code_paths=[str(code)],
            model_config={"threshold": threshold},
            input_example=input_example,
            # No input schema: with one, MLflow turns every input into a table, and an array of
            # images does not fit. `serving` checks each image itself.
            signature=ModelSignature(
                outputs=Schema([ColSpec("string", "label"), ColSpec("double", "probability")]),
                params=ParamSchema(
                    [
                        ParamSpec("abstain_below", "double", 0.0),
                        ParamSpec("whole", "boolean", False),
                    ]
                ),
            ),
            pip_requirements=[
                f"{package}=={version(package)}" for package in (*_SERVING_PACKAGES, *packages)
            ],
            # MLflow adds the tags of a run to its models.
            tags={**user_tag(), MODEL_DIGEST: digest},
        ).model_id


def logged_models(run: Run) -> list[LoggedModel]:
    """Return the models that a run logged completely, newest first."""
    logged = mlflow.search_logged_models(
        experiment_ids=[run.info.experiment_id],
        filter_string=f"source_run_id = '{run.info.run_id}'",
        order_by=[{"field_name": "creation_timestamp", "ascending": False}],
        output_format="list",
    )
    return [model for model in logged if model.status == LoggedModelStatus.READY]


def is_lost(uri: str) -> bool:
    """Return whether a model has no files.

    If its storage cannot be read, warn and return False: a rollback cannot wait for the repair.
    """
    try:
        return not mlflow.artifacts.list_artifacts(uri)
    # Each kind of storage has its own errors.
    except Exception as error:
        _log.warning("The files of %s cannot be listed: %s", uri, short_error(error))
        return False


def fetch_results(run_id: str, folder: Path) -> Path:
    """Download the results of a run's evaluation and export to a folder.

    Returns:
        A directory with `test.json`, `predictions.csv`, `export.json` and the plots.

    Raises:
        UserError: the run does not exist or has no results.
    """
    folder.mkdir(parents=True)
    try:
        path = Path(
            mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path="metrics", dst_path=str(folder)
            )
        )
    except (MlflowException, OSError) as error:
        reason = str(error).rstrip(".")
        raise UserError(
            f"Cannot read the results of the MLflow run {run_id}: {reason}. If they are lost, "
            "`dvc repro --force` makes a run that has them."
        ) from error
    if not (path / "test.json").is_file():
        raise UserError(
            f"The MLflow run {run_id} has no test metrics because its evaluation did not finish. "
            "`dvc repro` makes a run that has them."
        )
    return path
