"""What is logged to MLflow: inputs, metrics, files and the model."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from facegender.errors import UserError
from facegender.files import file_sha256
from facegender.labels import LABELS
from facegender.tracking.connection import (
    drop_log_on_failure,
    find_run_by_id,
    skip_if_server_failed,
    user_tag,
)

MODEL_NAME = "model"
MODEL_DIGEST = "facegender.model_sha256"
_PACKAGES = ("keras", "mlflow", "numpy", "pillow", "scikit-learn", "tensorflow")
# What `serving` imports; TensorFlow is not among it.
_SERVING_PACKAGES = ("ai-edge-litert", "mlflow", "numpy", "pandas", "pillow")


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide a result, by name."""
    return {package: version(package) for package in _PACKAGES}


@skip_if_server_failed
def log_inputs(params: Mapping[str, Any], manifests: Mapping[str, Path]) -> None:
    """Log parameters and datasets to the open run."""
    mlflow.log_params(dict(params))
    _log_datasets(manifests)


def _log_datasets(manifests: Mapping[str, Path]) -> None:
    for part, path in manifests.items():
        frame = pd.read_csv(path)
        frame["label"] = frame["label"].map({value: name for name, value in LABELS.items()})
        dataset = from_pandas(
            frame,
            source=f"data/splits/{path.name}",
            targets="label",
            name=part,
            digest=file_sha256(path)[:32],
        )
        mlflow.log_input(dataset, context=part)


@skip_if_server_failed
def set_tags(tags: Mapping[str, str]) -> None:
    """Set tags of the open run."""
    mlflow.set_tags(dict(tags))


@skip_if_server_failed
def log_epoch(epoch: int, metrics: Mapping[str, float], ended: int | None = None) -> None:
    """Log the metrics of an epoch to the open run while training goes on.

    Args:
        epoch: its number, from 1.
        metrics: by name.
        ended: when, in milliseconds since 1970; None is now. MLflow keeps one of two metrics that
            are equal in everything, so an epoch that is logged again with its time is there once.
    """
    mlflow.log_metrics(dict(metrics), step=epoch, timestamp=ended)


@skip_if_server_failed
def log_history(history: pd.DataFrame) -> None:
    """Log a finished training's metrics, a row an epoch, to the open run."""
    for row in history.to_dict("records"):
        epoch = int(row.pop("epoch"))
        log_epoch(epoch, {str(key): value for key, value in row.items()})


@skip_if_server_failed
def log_temperature(temperature: float) -> None:
    """Log the temperature of the calibration to the open run."""
    mlflow.log_metric("temperature", temperature)


@skip_if_server_failed
def log_evaluation(
    metrics: Mapping[str, Any],
    *,
    test_manifest: Path,
    files: Sequence[Path],
    model_id: str | None = None,
) -> None:
    """Log test metrics, under `test_` and their names, and files to the open run.

    The metrics are linked to the logged model that `model_id` names, if any.
    """
    _log_datasets({"test": test_manifest})
    log_numbers("test", metrics, model_id)
    for path in files:
        if path.is_dir():
            mlflow.log_artifacts(str(path), f"metrics/{path.name}")
        else:
            mlflow.log_artifact(str(path), "metrics")


@skip_if_server_failed
def log_export(report: Mapping[str, Any], *, models: Sequence[Path], metrics_file: Path) -> None:
    """Log the models' files, and metrics of the export under `export_` and their names.

    Args:
        report: the metrics.
        models: the trained model and what it was exported to, logged under `export`.
        metrics_file: the report's file.
    """
    log_numbers("export", report)
    for path in models:
        mlflow.log_artifact(str(path), "export")
    mlflow.log_artifact(str(metrics_file), "metrics")


def log_report(run_id: str, files: Sequence[Path], *, loss: float, folder: str | None) -> str:
    """Log pages about a run to it, and leave all else of it as it is.

    Args:
        run_id: of the run that holds the evaluation.
        files: the pages.
        loss: on the test split, as the pages tell it: proof that they are about this run.
        folder: of the artifacts, where the pages go; None for the top.

    Returns:
        A sentence that says where they went: nowhere, if this store has not seen the run or the
        run is about other results.
    """
    run = find_run_by_id(run_id)
    if run is None:
        return "not logged: this store has no run of the model's evaluation"
    if run.data.metrics.get("test_loss") != loss:
        return f"not logged: MLflow run {run_id} is about other results; `dvc repro` makes them one"
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
    model: Path,
    *,
    code: Path,
    threshold: float,
    input_example: Any,
) -> str:
    """Log an exported model to the open run as a `pyfunc` model that takes image bytes or arrays.

    The model carries this package's code, so that it loads where facegender is not installed, and
    no pickle. A run that holds the same model already is left as it is.

    Args:
        model: a `.tflite` file.
        code: the package's directory.
        threshold: P(male) from which the label is `male`.
        input_example: what `serving` takes, shown with the model.

    Returns:
        The id of the logged model.
    """
    run = mlflow.active_run()
    assert run is not None, "log_model needs an open run"  # noqa: S101 - a bug, not bad input
    digest = file_sha256(model)
    logged = mlflow.search_logged_models(
        experiment_ids=[run.info.experiment_id],
        filter_string=f"source_run_id = '{run.info.run_id}'",
        output_format="list",
    )
    for item in logged:
        if item.status == LoggedModelStatus.READY and item.tags.get(MODEL_DIGEST) == digest:
            return item.model_id
    return mlflow.pyfunc.log_model(
        name=MODEL_NAME,
        python_model=str(code / "inference" / "serving.py"),
        artifacts={"model": str(model)},
        code_paths=[str(code)],
        model_config={"threshold": threshold},
        input_example=input_example,
        # No schema of the inputs: MLflow would turn every input into a table first, and an array of
        # images is none. `serving` checks each image itself.
        signature=ModelSignature(
            outputs=Schema([ColSpec("string", "label"), ColSpec("double", "probability")]),
            params=ParamSchema([ParamSpec("abstain_below", "double", 0.5)]),
        ),
        pip_requirements=[f"{package}=={version(package)}" for package in _SERVING_PACKAGES],
        # A logged model gets the tags of a run once more.
        tags={**user_tag(), MODEL_DIGEST: digest},
    ).model_id


def fetch_results(run_id: str, folder: Path) -> Path:
    """Copy what a run logged of its evaluation and its export to a folder.

    Returns:
        A directory with `test.json`, `predictions.csv`, `export.json` and the plots.

    Raises:
        UserError: the run is not there, or has no results.
    """
    folder.mkdir(parents=True)
    try:
        path = Path(
            mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path="metrics", dst_path=str(folder)
            )
        )
    except (MlflowException, OSError) as error:
        raise UserError(f"Cannot read the results of the MLflow run {run_id}: {error}") from error
    if not (path / "test.json").is_file():
        raise UserError(
            f"The MLflow run {run_id} has no test metrics: its evaluation did not end. `dvc repro` "
            "makes a run that has."
        )
    return path
