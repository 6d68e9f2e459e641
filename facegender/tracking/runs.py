"""The life of an MLflow run: opened, continued, ended, failed.

One execution of the pipeline is one run: `training_run` opens it and `evaluation_run` continues it.
A stage that fails leaves its run FAILED, with its log. The run's id travels from stage to stage in
files.
"""

import json
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

from facegender.files import file_sha256
from facegender.tracking.connection import (
    EXPERIMENT,
    drop_log_on_failure,
    find_run_by_id,
    short_error,
    skip_if_server_failed,
    user_tag,
)
from facegender.tracking.local_store import run_lock
from facegender.tracking.log import (
    MODEL_DIGEST,
    log_history,
    log_inputs,
    package_versions,
    set_tags,
)

# Tags of a run that belongs to an experiment or a sweep.
_EXPERIMENT_TAGS = {"dvc.exp_name", "dvc.exp_baseline_rev", "mlflow.parentRunId"}
# Of a run that only records what DVC already had: it has no files.
RESTORED = "dvc.restored"
_BEST = "facegender.best"
_EVALUATION = "facegender.evaluation"
_SWEEP = "facegender.sweep"
_TRAINED_BY = "facegender.trained_by"
_log = logging.getLogger(__name__)


def write_run_id(run: Run, path: Path) -> None:
    """Write the id of a run for the stages that follow."""
    path.write_text(json.dumps({"run_id": run.info.run_id}) + "\n")


def read_run_id(path: Path) -> str:
    """Read the id that `write_run_id` wrote."""
    return json.loads(path.read_text())["run_id"]


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
        params: every parameter by its dotted name.
        tags: tags that identify the run; package versions are added.
        manifests: CSV of each split, logged as the run's datasets with their digests.
        resume: run id of an interrupted training, continued if this store has it and it holds the
            same parameters, which MLflow cannot change.
    """
    versions = {f"version.{package}": number for package, number in package_versions().items()}
    tags = {**versions, "version.python": platform.python_version(), **tags}
    begun = find_run_by_id(resume) if resume else None
    if begun is not None and _agrees(begun, params):
        with _open(begun) as run:
            # Another experiment, or another commit, may resume the training.
            set_tags(
                resolve_tags({**user_tag(), **tags, MLFLOW_RUN_NAME: name}),
                stale=(begun.data.tags.keys() & _EXPERIMENT_TAGS) - tags.keys(),
            )
            yield run
        return
    run = _new_run(name, tags)
    with _open(run) as run:
        log_inputs(params, manifests)
        yield run


def _new_run(name: str, tags: Mapping[str, str]) -> Run:
    """Create a run without opening it."""
    experiment = mlflow.set_experiment(EXPERIMENT)
    # Not `mlflow.start_run`, which continues the run that MLFLOW_RUN_ID may name.
    return MlflowClient().create_run(
        experiment.experiment_id, run_name=name, tags=resolve_tags({**user_tag(), **tags})
    )


def _agrees(run: Run, params: Mapping[str, Any]) -> bool:
    """Return whether every logged parameter of a run has the value that it has now."""
    logged = run.data.params
    # MLflow cuts longer values.
    return all(
        logged[name] == str(value)[:MAX_PARAM_VAL_LENGTH]
        for name, value in params.items()
        if name in logged
    )


@contextmanager
def _open(run: Run) -> Iterator[Run]:
    with run_lock(run.info.artifact_uri) as removal:
        try:
            # Nested because a sweep's own run may be open.
            mlflow.start_run(run_id=run.info.run_id, nested=True)
        except BaseException:
            removal.pop_all()  # so that `_end_dead_runs` finds it
            raise
        try:
            yield run
        except BaseException:
            # The first error matters more than a store that now fails too, such as a database
            # that was interrupted while writing.
            try:
                _end("FAILED")
            except MlflowException as error:
                removal.pop_all()  # so that `_end_dead_runs` finds it
                _log.warning("MLflow still lists this run as running (%s)", short_error(error))
            raise
        _end("FINISHED")


def _end(status: str) -> None:
    if mlflow.active_run() is not None:
        with drop_log_on_failure():
            mlflow.end_run(status)


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

    That is the run that trained the model, unless this store does not have it (a fresh clone, a
    model from DVC's cache), it already holds another evaluation, or it holds other parameters (the
    model was reused with changed ones). Then it is a separate run with `name` and `tags`, which
    copies parameters and history; a repeated evaluation finds it again, so nothing is lost or
    logged twice. What an outage kept from either run is logged now.

    Args:
        trained_by: id of the run that trained the model.
        evaluation: digest of everything that decides the evaluation's result.
        history: metrics, one row per epoch.
        inputs: tags that identify the inputs, as known after training; for either run.

    Yields:
        The run, and a sentence that says which run it is and why.
    """
    trained = find_run_by_id(trained_by)
    agrees = trained is not None and _agrees(trained, params)
    if trained and agrees and trained.data.tags.get(_EVALUATION) in {None, evaluation}:
        with _open(trained) as run:
            set_tags({**inputs, _EVALUATION: evaluation})
            _complete(run, params, manifests, history)
            yield run, f"logged to MLflow run {run.info.run_id}, which trained the model"
        return

    why = (
        "this store has no run that trained the model"
        if trained is None
        else "the run that trained the model holds "
        + ("another evaluation" if agrees else "other parameters")
    )
    found = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string=f"tags.`{_EVALUATION}` = '{evaluation}' "
        f"and tags.`{_TRAINED_BY}` = '{trained_by}'",
        output_format="list",
    )
    if own := [run for run in found if _agrees(run, params)]:
        with _open(own[0]) as run:
            _complete(run, params, manifests, history)
            yield run, f"logged to MLflow run {run.info.run_id} again: {why}"
        return
    with training_run(
        name=name,
        params=params,
        tags={
            **tags,
            **inputs,
            _EVALUATION: evaluation,
            _TRAINED_BY: trained_by,
            MODEL_DIGEST: file_sha256(model),
        },
        manifests=manifests,
    ) as run:
        log_history(history)
        yield run, f"logged to a new MLflow run {run.info.run_id}: {why}"


@skip_if_server_failed
def _complete(
    run: Run, params: Mapping[str, Any], manifests: Mapping[str, Path], history: pd.DataFrame
) -> None:
    """Log what is missing because the server failed before."""
    logged = {item.dataset.name for item in run.inputs.dataset_inputs} if run.inputs else set()
    log_inputs(
        {key: value for key, value in params.items() if key not in run.data.params},
        {name: path for name, path in manifests.items() if name not in logged},
    )
    steps = {point.step for point in MlflowClient().get_metric_history(run.info.run_id, "loss")}
    log_history(history[~history["epoch"].isin(steps)])


def log_failure(
    log: str, *, stage: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> str:
    """Log the output of a failed stage as `log/<stage>.txt`, mark its run FAILED, return its id.

    The output must be without credentials. For a stage that has not opened a run, one is created
    with `name`, `params` and `tags`.
    """
    run = mlflow.last_active_run()
    if run is None:
        return failed_run(log, stage=stage, name=name, params=params, tags=tags)
    return _fail(run, log, stage)


def failed_run(
    log: str, *, stage: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> str:
    """Log a run that failed before it was opened; arguments as in `log_failure`."""
    run = _new_run(name, tags)
    with suppress(MlflowException):  # the parameters may be what is wrong
        for key, value in params.items():
            MlflowClient().log_param(run.info.run_id, key, value)
    return _fail(run, log, stage)


def _fail(run: Run, log: str, stage: str) -> str:
    MlflowClient().log_text(run.info.run_id, log, f"log/{stage}.txt")
    MlflowClient().set_terminated(run.info.run_id, "FAILED")
    return run.info.run_id


@contextmanager
def sweep_run(name: str, grid: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """Open a sweep's run, the parent of its experiments' runs, and yield its id."""
    with _open(_new_run(name, {_SWEEP: "true"})) as run:
        log_inputs({key: ", ".join(map(str, values)) for key, values in grid.items()}, {})
        yield run.info.run_id


def find_child(parent: str, experiment: str) -> str | None:
    """Return the id of the run that a sweep's experiment logged, or None."""
    runs = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string=f"tags.`mlflow.parentRunId` = '{parent}' "
        f"and tags.`dvc.exp_name` = '{experiment}'",
        output_format="list",
    )
    return runs[0].info.run_id if runs else None


def validation_loss(run_id: str) -> float | None:
    """Return a run's validation loss at the epoch whose weights it kept, or None."""
    return mlflow.get_run(run_id).data.metrics.get("kept_val_loss")


@skip_if_server_failed
def log_summary(metrics: Mapping[str, float]) -> None:
    """Log metrics over all runs of the open sweep to the sweep's run."""
    mlflow.log_metrics(dict(metrics))


@skip_if_server_failed
def mark_best(run_id: str, name: str, loss: float) -> None:
    """Tag the best run of the open sweep, and name it in the sweep's run."""
    MlflowClient().set_tag(run_id, _BEST, "true")
    mlflow.set_tag(_BEST, name)
    mlflow.log_metric("best_val_loss", loss)
