"""MLflow: where runs are kept, and the life of a run. No other module knows its addresses.

One execution of the pipeline is one run: `training_run` opens it, `evaluation_run` continues it.
`log_export` adds to it.
The run's id travels from train to evaluate, and on to export, in files.
"""

import getpass
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from filelock import FileLock
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema
from mlflow.utils.mlflow_tags import MLFLOW_USER

from facegender.files import file_sha256
from facegender.labels import LABELS

EXPERIMENT = "facegender"
MODEL_NAME = "model"

_PACKAGES = ("keras", "mlflow", "numpy", "pillow", "scikit-learn", "tensorflow")
_EVALUATION = "facegender.evaluation"
_TRAINED_BY = "facegender.trained_by"
_TRAINED_MODEL = "facegender.model_sha256"


def write_run_id(run: Run, path: Path) -> None:
    """Write the id of a run, for the stages that follow."""
    path.write_text(json.dumps({"run_id": run.info.run_id}) + "\n")


def read_run_id(path: Path) -> str:
    """Read the id that `write_run_id` wrote."""
    return json.loads(path.read_text())["run_id"]


def connect(root: Path, uri: str | None = None) -> None:
    """Choose the store, and make the experiment in it if it is new.

    Args:
        root: the repository; without `uri` the store is its `mlflow.db`, with artifacts under its
            `mlruns/`: what a bare `mlflow ui` shows when started there.
        uri: another tracking server (MLFLOW_TRACKING_URI), or None.
    """
    mlflow.set_tracking_uri(uri or f"sqlite:///{root / 'mlflow.db'}")
    artifacts = None if uri else (root / "mlruns" / EXPERIMENT).as_uri()
    # Two pipelines that start together must not both create the database's tables.
    lock = root / ".dvc" / "tmp" / "mlflow.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if mlflow.get_experiment_by_name(EXPERIMENT) is None:
            mlflow.create_experiment(EXPERIMENT, artifact_location=artifacts)
    mlflow.set_experiment(EXPERIMENT)


@contextmanager
def training_run(
    *,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    manifests: Mapping[str, Path],
) -> Iterator[Run]:
    """Open a run for a training; it ends FINISHED, or FAILED if the body raises.

    Args:
        name: shown in the list of runs.
        params: every parameter under its dotted name.
        tags: what else identifies the run; versions of packages are added.
        manifests: the CSV of each part, logged as the run's datasets with their digests.
    """
    versions = {f"version.{package}": version(package) for package in _PACKAGES}
    versions["version.python"] = platform.python_version()
    with mlflow.start_run(run_name=name, tags={**_user(), **versions, **tags}) as run:
        mlflow.log_params(dict(params))
        _log_datasets(manifests)
        yield run


def _user() -> dict[str, str]:
    """Return MLflow's tag for the user: the account, not the name that logs in to its server."""
    try:
        return {MLFLOW_USER: getpass.getuser()}
    except (KeyError, OSError):  # as in a container whose user has no name
        return {MLFLOW_USER: "unknown"}


def log_epoch(epoch: int, metrics: Mapping[str, float]) -> None:
    """Log the metrics of an epoch to the open run while training goes on."""
    mlflow.log_metrics(dict(metrics), step=epoch)


def log_temperature(temperature: float) -> None:
    """Log the temperature of the calibration to the open run."""
    mlflow.log_metric("temperature", temperature)


@contextmanager
def evaluation_run(
    trained_by: str,
    *,
    model: Path,
    evaluation: str,
    params: Mapping[str, Any],
    manifests: Mapping[str, Path],
    history: pd.DataFrame,
    name: str,
    tags: Mapping[str, str],
) -> Iterator[tuple[Run, str]]:
    """Open the run that an evaluation belongs to.

    That is the run that trained the model, unless this store has never seen it (a fresh clone, a
    model from DVC's cache) or it already holds another evaluation (the model was reused with other
    parameters). Then it is a run of its own, which takes over parameters and history; evaluating
    once more finds it again, so nothing is lost and nothing is there twice.

    Args:
        trained_by: id of the run that trained the model.
        model: the model's file.
        evaluation: digest of all that decides the evaluation's result.
        params: as in `training_run`, for a run of its own.
        manifests: as in `training_run`, for a run of its own.
        history: a row an epoch, for a run of its own.
        name: as in `training_run`, for a run of its own.
        tags: as in `training_run`, for a run of its own.

    Yields:
        The run, and a sentence that says which run it is and why.
    """
    trained = _find(trained_by)
    if trained is not None and trained.data.tags.get(_EVALUATION) in {None, evaluation}:
        with mlflow.start_run(run_id=trained_by) as run:
            mlflow.set_tag(_EVALUATION, evaluation)
            yield run, f"logged to MLflow run {run.info.run_id}, which trained the model"
        return

    why = (
        "this store has no run of the training that made the model"
        if trained is None
        else "the run that trained the model holds another evaluation"
    )
    own = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string=f"tags.`{_EVALUATION}` = '{evaluation}' "
        f"and tags.`{_TRAINED_BY}` = '{trained_by}'",
        output_format="list",
    )
    if own:
        with mlflow.start_run(run_id=own[0].info.run_id) as run:
            yield run, f"logged to MLflow run {run.info.run_id} again, for {why}"
        return
    with training_run(
        name=name,
        params=params,
        tags={
            **tags,
            _EVALUATION: evaluation,
            _TRAINED_BY: trained_by,
            _TRAINED_MODEL: file_sha256(model),
        },
        manifests=manifests,
    ) as run:
        for row in history.to_dict("records"):
            epoch = int(row.pop("epoch"))
            log_epoch(epoch, {str(key): value for key, value in row.items()})
        yield run, f"logged to a new MLflow run {run.info.run_id}, for {why}"


def log_evaluation(
    metrics: Mapping[str, Any], *, test_manifest: Path, files: Sequence[Path]
) -> None:
    """Log test metrics, under `test_` and their names, and files to the open run."""
    _log_datasets({"test": test_manifest})
    mlflow.log_metrics({f"test_{name}": value for name, value in _numbers(metrics)})
    for path in files:
        if path.is_dir():
            mlflow.log_artifacts(str(path), f"metrics/{path.name}")
        else:
            mlflow.log_artifact(str(path), "metrics")


def log_export(
    run_id: str, report: Mapping[str, Any], *, models: Sequence[Path], metrics_file: Path
) -> str:
    """Log exported models, and their metrics under `export_` and their names, to an ended run.

    Args:
        run_id: of the run that holds the evaluation of the model.
        report: the metrics.
        models: files, logged under `export`.
        metrics_file: the report's file.

    Returns:
        A sentence that says where it went: nowhere, if this store has not seen the run.
    """
    if _find(run_id) is None:
        return "not logged: this store has no run of the model's evaluation"
    with mlflow.start_run(run_id=run_id):
        mlflow.log_metrics({f"export_{name}": value for name, value in _numbers(report)})
        for path in models:
            mlflow.log_artifact(str(path), "export")
        mlflow.log_artifact(str(metrics_file), "metrics")
    return f"logged to MLflow run {run_id}, which holds the evaluation"


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield prefix + name, value


def digest(files: Sequence[Path], text: str) -> str:
    """Return one SHA-256 for the contents of files and a text."""
    parts = [file_sha256(path) for path in files]
    return hashlib.sha256("\n".join([*parts, text]).encode()).hexdigest()


def log_model(
    model: Path,
    *,
    code: Path,
    threshold: float,
    input_example: Any,
) -> None:
    """Log a saved model to the open run as a `pyfunc` model that takes image bytes or arrays.

    The model carries this package's code, so that it loads where facegender is not installed, and
    no pickle. A run that holds the same model already is left as it is.

    Args:
        model: a `.keras` file.
        code: the package's directory.
        threshold: P(male) from which the label is `male`.
        input_example: what `serving` takes, shown with the model.
    """
    run = mlflow.active_run()
    assert run is not None, "log_model needs an open run"  # noqa: S101 - a bug, not bad input
    digest = file_sha256(model)
    logged = mlflow.search_logged_models(
        experiment_ids=[run.info.experiment_id],
        filter_string=f"source_run_id = '{run.info.run_id}'",
        output_format="list",
    )
    if any(item.tags.get(_TRAINED_MODEL) == digest for item in logged):
        return
    mlflow.pyfunc.log_model(
        name=MODEL_NAME,
        python_model=str(code / "serving.py"),
        artifacts={"model": str(model)},
        code_paths=[str(code)],
        model_config={"threshold": threshold},
        input_example=input_example,
        # No schema of the inputs: MLflow would turn every input into a table first, and an array of
        # images is none. `serving` checks each image itself.
        signature=ModelSignature(
            outputs=Schema([ColSpec("string", "label"), ColSpec("double", "probability")])
        ),
        pip_requirements=[f"{package}=={version(package)}" for package in (*_PACKAGES, "pandas")],
        # A logged model gets the tags of a run once more.
        tags={**_user(), _TRAINED_MODEL: digest},
    )


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


def _find(run_id: str) -> Run | None:
    try:
        run = mlflow.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None
