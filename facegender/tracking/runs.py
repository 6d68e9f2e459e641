"""MLflow: where runs are kept, and the life of a run. No other module knows its addresses.

One execution of the pipeline is one run: `training_run` opens it, `evaluation_run` continues it,
`log_export` and `log_report` add to it. A stage that fails leaves its run FAILED, with its log.
The run's id travels from train to evaluate, and on to what follows, in files.

A tracking server that fails costs the log, never the work: if it is down at the start of a stage,
the stage logs to the local store; if it fails later, the rest of the stage is not logged. Either
way a warning says how to send what is missing.
"""

import getpass
import json
import logging
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import LoggedModelStatus, Run
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking.context.registry import resolve_tags
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME, MLFLOW_USER
from requests import RequestException

from facegender.errors import UserError
from facegender.files import file_sha256
from facegender.labels import LABELS
from facegender.tracking.local_store import alive, is_dead, relocate, store_home

EXPERIMENT = "facegender"
MODEL_NAME = "model"

_PACKAGES = ("keras", "mlflow", "numpy", "pillow", "scikit-learn", "tensorflow")
_BEST = "facegender.best"
# What `serving` imports; TensorFlow is not among it.
_SERVING_PACKAGES = ("ai-edge-litert", "mlflow", "numpy", "pandas", "pillow")
_EVALUATION = "facegender.evaluation"
_SWEEP = "facegender.sweep"
_TRAINED_BY = "facegender.trained_by"
_TRAINED_MODEL = "facegender.model_sha256"

_SEND = (
    "All results are on disk. When the server answers again, send them with "
    "`dvc repro --force --single-item evaluate report`"
)

CHECK_LOGIN = "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"

_log = logging.getLogger(__name__)


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide a result, by name."""
    return {package: version(package) for package in _PACKAGES}


def write_run_id(run: Run, path: Path) -> None:
    """Write the id of a run, for the stages that follow."""
    path.write_text(json.dumps({"run_id": run.info.run_id}) + "\n")


def read_run_id(path: Path) -> str:
    """Read the id that `write_run_id` wrote."""
    return json.loads(path.read_text())["run_id"]


def connect(root: Path, uri: str | None = None, *, required: bool = False) -> int:
    """Choose the store, make the experiment in it if it is new, and mend what is out of date.

    A server that does not answer is replaced by the repository's own store, with a warning, unless
    it is `required`: what is asked of a server must not be done elsewhere.

    In the repository's own store, addresses of artifacts are rewritten if it was moved, and runs
    whose process is gone (killed outright, or the machine went off) are marked KILLED.

    Args:
        root: the repository; without `uri` the store is its `mlflow.db`, with artifacts under its
            `mlruns/`: what a bare `mlflow ui` shows when started there.
        uri: another tracking server (MLFLOW_TRACKING_URI), or None.
        required: whether a server that does not answer is an error.

    Returns:
        The number of addresses that were rewritten.

    Raises:
        UserError: the experiment was deleted from the store.
        MlflowException: the server is required and does not answer.
    """
    home = store_home(root)
    own = f"sqlite:///{home / 'mlflow.db'}"
    if not required and uri not in {None, own} and (trouble := _trouble(str(uri))):
        _log.warning(
            "the MLflow server that MLFLOW_TRACKING_URI names %s, so this stage logs to mlflow.db. "
            "%s.",
            trouble,
            _SEND,
        )
        uri = None
    local = uri in {None, own}
    artifacts = (home / "mlruns" / EXPERIMENT).as_uri() if local else None
    # Two pipelines that start together must not both create the database's tables.
    lock = root / ".dvc" / "tmp" / "mlflow.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    # In `home`, for of a new database the working directory becomes the default place of artifacts.
    with FileLock(lock), chdir(home):
        if local and not (home / "mlflow.db").exists():
            _make_database(home)
        moved = relocate(home, EXPERIMENT) if local else 0
        mlflow.set_tracking_uri(uri or own)
        experiment = mlflow.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            _create_experiment(artifacts)
        elif experiment.lifecycle_stage != "active":
            raise UserError(
                f"MLflow's experiment `{EXPERIMENT}` was deleted, so nothing can be logged to it. "
                "Restore it with `mlflow experiments restore --experiment-id "
                f"{experiment.experiment_id}`, or remove it for good with `mlflow gc`."
            )
        if local:
            _end_dead_runs()
    mlflow.set_experiment(EXPERIMENT)
    return moved


def _create_experiment(artifacts: str | None) -> None:
    try:
        mlflow.create_experiment(EXPERIMENT, artifact_location=artifacts)
    except MlflowException as error:
        # Another machine was faster.
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _make_database(home: Path) -> None:
    """Have MLflow fill a database aside, for one half filled by a kill is beyond repair."""
    new = home / "mlflow.db.new"
    new.unlink(missing_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{new}")
    mlflow.get_experiment_by_name(EXPERIMENT)
    new.rename(home / "mlflow.db")


def _trouble(uri: str) -> str | None:
    """Return what is wrong with the server at `uri`, or None if it can be used."""
    mlflow.set_tracking_uri(uri)
    try:
        mlflow.get_experiment_by_name(EXPERIMENT)
    except (MlflowException, RequestException) as error:
        return (
            f"refuses you ({CHECK_LOGIN})"
            if is_refusal(error)
            else f"does not answer ({_short(error)})"
        )
    return None


def is_refusal(error: Exception) -> bool:
    """Return whether a server did not accept name and password."""
    return isinstance(error, MlflowException) and error.error_code == "UNAUTHENTICATED"


def _short(error: Exception) -> str:
    # No more than the kind of error, for the address in its text may hold a password.
    if isinstance(error, MlflowException) and error.__cause__ is error.__context__ is None:
        return error.error_code
    return type(error.__cause__ or error.__context__ or error).__name__


def _unless_down(log: Callable[..., None]) -> Callable[..., None]:
    """Have a function that logs to the open run do nothing once the server has failed."""

    @wraps(log)
    def logged(*args: Any, **kwargs: Any) -> None:
        if mlflow.active_run() is None:
            return
        with _lost_if_down():
            log(*args, **kwargs)

    return logged


@contextmanager
def _lost_if_down() -> Iterator[None]:
    """Give the log up, with a warning, if the body fails at a tracking server."""
    try:
        yield
    except (MlflowException, RequestException) as error:
        # A local store that fails is a full disk or a bug: the stage ends, and can be run again.
        if mlflow.get_tracking_uri().startswith("sqlite:"):
            raise
        _log.warning(
            "the MLflow server failed (%s): the rest of this stage is not logged. %s.",
            _short(error),
            _SEND,
        )
        # No run is open any more, so that nothing waits for the server again.
        with suppress(MlflowException, RequestException):
            mlflow.end_run("FAILED")


def _end_dead_runs() -> None:
    running = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string="attributes.status = 'RUNNING'",
        output_format="list",
    )
    for run in running:
        if is_dead(run.info.artifact_uri):
            MlflowClient().set_terminated(run.info.run_id, "KILLED")


@contextmanager
def training_run(
    *,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    manifests: Mapping[str, Path],
    resume: str | None = None,
) -> Iterator[Run]:
    """Open a run for a training; it ends FINISHED, or FAILED if the body raises.

    Args:
        name: shown in the list of runs.
        params: every parameter under its dotted name.
        tags: what else identifies the run; versions of packages are added.
        manifests: the CSV of each part, logged as the run's datasets with their digests.
        resume: id of the run of a training that was interrupted, to go on with if this store has
            it.
    """
    begun = _find(resume) if resume else None
    if begun is not None:
        with _open(begun) as run:
            # It may be another experiment that takes the training up.
            _set_tags({**tags, MLFLOW_RUN_NAME: name})
            yield run
        return
    versions = {f"version.{package}": number for package, number in package_versions().items()}
    run = _new_run(name, {**versions, "version.python": platform.python_version(), **tags})
    with _open(run) as run:
        _log_inputs(params, manifests)
        yield run


@_unless_down
def _log_inputs(params: Mapping[str, Any], manifests: Mapping[str, Path]) -> None:
    mlflow.log_params(dict(params))
    _log_datasets(manifests)


@_unless_down
def _set_tags(tags: Mapping[str, str]) -> None:
    mlflow.set_tags(dict(tags))


def _new_run(name: str, tags: Mapping[str, str]) -> Run:
    """Make a run that waits to be opened."""
    experiment = mlflow.set_experiment(EXPERIMENT)
    # By the client, for `mlflow.start_run` would take up the run that MLFLOW_RUN_ID may name.
    return MlflowClient().create_run(
        experiment.experiment_id,
        run_name=name,
        tags=resolve_tags({**_user(), **tags}),
    )


@contextmanager
def _open(run: Run) -> Iterator[Run]:
    with alive(run.info.artifact_uri) as removal:
        # Nested, for a sweep's own run may be open.
        mlflow.start_run(run_id=run.info.run_id, nested=True)
        try:
            yield run
        except BaseException:
            # What went wrong matters more than a store that fails now as well, such as a database
            # that was interrupted while it wrote.
            try:
                _end("FAILED")
            except MlflowException as error:
                removal.pop_all()  # so that `_end_dead_runs` finds it
                _log.warning("MLflow has this run as running still (%s)", _short(error))
            raise
        _end("FINISHED")


def _end(status: str) -> None:
    if mlflow.active_run() is not None:
        with _lost_if_down():
            mlflow.end_run(status)


def _user() -> dict[str, str]:
    """Return MLflow's tag for the user: the account, not the name that logs in to its server."""
    try:
        return {MLFLOW_USER: getpass.getuser()}
    except (KeyError, OSError):  # as in a container whose user has no name
        return {MLFLOW_USER: "unknown"}


@_unless_down
def log_epoch(epoch: int, metrics: Mapping[str, float], ended: int | None = None) -> None:
    """Log the metrics of an epoch to the open run while training goes on.

    Args:
        epoch: its number, from 1.
        metrics: by name.
        ended: when, in milliseconds since 1970; None is now. MLflow keeps one of two metrics that
            are equal in everything, so an epoch that is logged again with its time is there once.
    """
    mlflow.log_metrics(dict(metrics), step=epoch, timestamp=ended)


@_unless_down
def log_history(history: pd.DataFrame) -> None:
    """Log a finished training's metrics, a row an epoch, to the open run."""
    for row in history.to_dict("records"):
        epoch = int(row.pop("epoch"))
        log_epoch(epoch, {str(key): value for key, value in row.items()})


@_unless_down
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
    inputs: Mapping[str, str],
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
        inputs: tags that tell the inputs, as known after training; for either run.

    Yields:
        The run, and a sentence that says which run it is and why.
    """
    trained = _find(trained_by)
    if trained is not None and trained.data.tags.get(_EVALUATION) in {None, evaluation}:
        with _open(trained) as run:
            _set_tags({**inputs, _EVALUATION: evaluation})
            _complete(run, history)
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
        with _open(own[0]) as run:
            yield run, f"logged to MLflow run {run.info.run_id} again, for {why}"
        return
    with training_run(
        name=name,
        params=params,
        tags={
            **tags,
            **inputs,
            _EVALUATION: evaluation,
            _TRAINED_BY: trained_by,
            _TRAINED_MODEL: file_sha256(model),
        },
        manifests=manifests,
    ) as run:
        log_history(history)
        yield run, f"logged to a new MLflow run {run.info.run_id}, for {why}"


@_unless_down
def _complete(run: Run, history: pd.DataFrame) -> None:
    """Log the epochs that a server did not get, for it failed while the model was trained."""
    steps = {point.step for point in MlflowClient().get_metric_history(run.info.run_id, "loss")}
    log_history(history[~history["epoch"].isin(steps)])


@_unless_down
def log_evaluation(
    metrics: Mapping[str, Any], *, test_manifest: Path, files: Sequence[Path]
) -> None:
    """Log test metrics, under `test_` and their names, and files to the open run."""
    _log_datasets({"test": test_manifest})
    log_numbers("test", metrics)
    for path in files:
        if path.is_dir():
            mlflow.log_artifacts(str(path), f"metrics/{path.name}")
        else:
            mlflow.log_artifact(str(path), "metrics")


@_unless_down
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


def log_failure(
    log: str, *, stage: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> str:
    """Log what a stage that failed had printed, as `log/<stage>.txt`, and mark its run FAILED.

    Args:
        log: the text, without credentials.
        stage: its name.
        name: as in `training_run`, for a run of its own: an early stage has opened none.
        params: as in `training_run`, for a run of its own.
        tags: as in `training_run`, for a run of its own.

    Returns:
        The run's id.
    """
    run = mlflow.last_active_run()
    if run is None:
        return failed_run(log, stage=stage, name=name, params=params, tags=tags)
    return _fail(run, log, stage)


def failed_run(
    log: str, *, stage: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> str:
    """Log a run that failed before it could log itself; the arguments are `log_failure`'s."""
    run = _new_run(name, tags)
    with suppress(MlflowException):  # bad input may be what failed
        for key, value in params.items():
            MlflowClient().log_param(run.info.run_id, key, value)
    return _fail(run, log, stage)


def _fail(run: Run, log: str, stage: str) -> str:
    MlflowClient().log_text(run.info.run_id, log, f"log/{stage}.txt")
    MlflowClient().set_terminated(run.info.run_id, "FAILED")
    return run.info.run_id


@contextmanager
def sweep_run(name: str, grid: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """Open a run for a sweep, the parent of its experiments' runs, and yield its id."""
    with _open(_new_run(name, {_SWEEP: "true"})) as run:
        mlflow.log_params({key: ", ".join(map(str, values)) for key, values in grid.items()})
        yield run.info.run_id


def find_child(parent: str, experiment: str) -> str | None:
    """Return the id of the run that an experiment of a sweep logged, if it did."""
    runs = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string=f"tags.`mlflow.parentRunId` = '{parent}' "
        f"and tags.`dvc.exp_name` = '{experiment}'",
        output_format="list",
    )
    return runs[0].info.run_id if runs else None


def validation_loss(run_id: str) -> float | None:
    """Return a run's validation loss at the epoch whose weights it kept; None if there is none."""
    losses = [point.value for point in MlflowClient().get_metric_history(run_id, "val_loss")]
    if mlflow.get_run(run_id).data.params["train.keep"] == "last":
        losses = losses[-1:]
    return min((loss for loss in losses if not math.isnan(loss)), default=None)


def mark_best(run_id: str, name: str, loss: float) -> None:
    """Mark the best run of the sweep that is open, and name it there."""
    MlflowClient().set_tag(run_id, _BEST, "true")
    mlflow.set_tag(_BEST, name)
    mlflow.log_metric("best_val_loss", loss)


@_unless_down
def log_numbers(prefix: str, metrics: Mapping[str, Any]) -> None:
    """Log every number in a metrics file to the open run, as `<prefix>_` and its dotted name."""
    mlflow.log_metrics({f"{prefix}_{name}": value for name, value in _numbers(metrics)})


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
    run = _find(run_id)
    if run is None:
        return "not logged: this store has no run of the model's evaluation"
    if run.data.metrics.get("test_loss") != loss:
        return f"not logged: MLflow run {run_id} is about other results; `dvc repro` makes them one"
    client = mlflow.MlflowClient()
    with _lost_if_down():
        for path in files:
            client.log_artifact(run_id, str(path), folder)
        return f"logged to MLflow run {run_id}, which holds the evaluation"
    return "not logged: the server failed"


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


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield prefix + name, value


@_unless_down
def log_model(
    model: Path,
    *,
    code: Path,
    threshold: float,
    input_example: Any,
) -> None:
    """Log an exported model to the open run as a `pyfunc` model that takes image bytes or arrays.

    The model carries this package's code, so that it loads where facegender is not installed, and
    no pickle. A run that holds the same model already is left as it is.

    Args:
        model: a `.tflite` file.
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
    ready = [item for item in logged if item.status == LoggedModelStatus.READY]
    if any(item.tags.get(_TRAINED_MODEL) == digest for item in ready):
        return
    mlflow.pyfunc.log_model(
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
