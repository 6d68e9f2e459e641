"""Which MLflow store is used, and what happens if its server fails.

No other module knows the store's addresses.

If a tracking server fails we lose the log, never the results: if it is down when a stage starts,
the stage logs to the local store; if it fails later, the rest of the stage is not logged. Either
way a warning says how to send what is missing.
"""

import getpass
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_USER
from requests import RequestException
from sqlalchemy.exc import DatabaseError

from facegender.errors import UserError
from facegender.tracking.local_store import owner_is_gone, relocate, store_home

P = ParamSpec("P")
T = TypeVar("T")

EXPERIMENT = "facegender"
_SEND = (
    "All results are on disk. When the server answers again, send them with "
    "`dvc repro --force --single-item evaluate report`"
)
CHECK_LOGIN = "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
_log = logging.getLogger(__name__)


def connect(root: Path, uri: str | None = None, *, required: bool = False) -> int:
    """Choose the store, create the experiment if it is new, and repair what is out of date.

    If the server does not answer, the repository's own store replaces it, with a warning, unless
    the server is `required`.

    In the repository's own store, artifact addresses are rewritten if it was moved, and runs whose
    process is gone (killed, or the machine went off) are marked KILLED.

    Args:
        root: the repository. Without `uri` the store is its `mlflow.db`, with artifacts under its
            `mlruns/`: what a bare `mlflow ui` shows when started there.
        uri: address of a tracking server (MLFLOW_TRACKING_URI), or None. A relative path in it
            starts at `root`, because stages of temporary experiments run elsewhere.
        required: whether a server that does not answer is an error.

    Returns:
        The number of rewritten addresses.

    Raises:
        UserError: the experiment was deleted from the store, or the local store cannot be used.
        MlflowException: the server is required and does not answer.
    """
    home = store_home(root)
    own = f"sqlite:///{home / 'mlflow.db'}"
    uri = _absolute(uri, root)
    local = uri in {None, own}
    lock = root / ".dvc" / "tmp" / "mlflow.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    # MLflow puts a new database's artifacts under the working directory.
    with chdir(home):
        problem = None if required or local else _server_problem(str(uri))
    if problem:
        _log.warning(
            "the MLflow server that MLFLOW_TRACKING_URI names %s, so this stage logs to mlflow.db. "
            "%s.",
            problem,
            _SEND,
        )
        uri, local = None, True
    artifacts = (home / "mlruns" / EXPERIMENT).as_uri() if local else None
    # Two pipelines that start together must not both create the database's tables.
    with FileLock(lock), chdir(home):
        if local and not (home / "mlflow.db").exists():
            _make_database(home)
        elif local:
            _check_database(home / "mlflow.db")
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


def _absolute(uri: str | None, root: Path) -> str | None:
    """Return the address with its path made absolute, if it is a database file or a folder."""
    if uri is None:
        return None
    scheme, separator, path = uri.partition("sqlite:///")
    if separator and not scheme and path and not path.startswith("/"):
        return f"sqlite:///{(root / path).resolve()}"
    if ":" not in uri and not uri.startswith("databricks"):
        return str(root / uri)
    return uri


def _create_experiment(artifacts: str | None) -> None:
    try:
        mlflow.create_experiment(EXPERIMENT, artifact_location=artifacts)
    except MlflowException as error:
        # Another machine created it first.
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _make_database(home: Path) -> None:
    """Create the database under a temporary name: a half-initialised one cannot be repaired."""
    new = home / "mlflow.db.new"
    new.unlink(missing_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{new}")
    mlflow.get_experiment_by_name(EXPERIMENT)
    new.rename(home / "mlflow.db")


def _check_database(database: Path) -> None:
    """Raise UserError if the store is damaged, read-only or of another version of MLflow."""
    remedy = f"Restore a copy of {database}, or move it away: the next stage makes a new one."
    if not database.is_file():
        # Docker makes a folder for a bind mount of a missing file.
        raise UserError(f"MLflow's store mlflow.db is not a file. {remedy}")
    if not os.access(database, os.W_OK):
        raise UserError(f"MLflow's store {database} is not writable: change its permissions.")
    try:
        mlflow.set_tracking_uri(f"sqlite:///{database}")
        mlflow.get_experiment_by_name(EXPERIMENT)
    except MlflowException as error:
        if "out-of-date database schema" in str(error):
            raise UserError(
                "MLflow's store mlflow.db was made by another version of MLflow. `make install` "
                "installs the version in requirements.lock. If the store is older, copy it, then "
                f"run `mlflow db upgrade sqlite:///{database}`. Or move it away: the next stage "
                "makes a new one."
            ) from error
        raise
    except DatabaseError as error:
        raise UserError(f"MLflow's store mlflow.db is damaged: {error.orig}. {remedy}") from error


def _server_problem(uri: str) -> str | None:
    """Return why the server at `uri` cannot be used, or None."""
    mlflow.set_tracking_uri(uri)
    try:
        mlflow.get_experiment_by_name(EXPERIMENT)
    except (MlflowException, RequestException) as error:
        return (
            f"refused the login ({CHECK_LOGIN})"
            if is_refusal(error)
            else f"does not answer ({short_error(error)})"
        )
    return None


def is_refusal(error: Exception) -> bool:
    """Return whether a server rejected the name and password."""
    return isinstance(error, MlflowException) and error.error_code == "UNAUTHENTICATED"


def short_error(error: Exception) -> str:
    """Return only the kind of an error: the address in its text may hold a password."""
    if isinstance(error, MlflowException) and error.__cause__ is error.__context__ is None:
        return error.error_code
    return type(error.__cause__ or error.__context__ or error).__name__


def skip_if_server_failed(log: Callable[P, T]) -> Callable[P, T | None]:
    """Decorator: make a logging function a no-op that returns None after the server has failed."""

    @wraps(log)
    def logged(*args: P.args, **kwargs: P.kwargs) -> T | None:
        if mlflow.active_run() is not None:
            with drop_log_on_failure():
                return log(*args, **kwargs)
        return None

    return logged


@contextmanager
def drop_log_on_failure() -> Iterator[None]:
    """Stop logging, with a warning, if a tracking server fails in the body."""
    try:
        yield
    except (MlflowException, RequestException) as error:
        # A local store fails because of a full disk or a bug: end the stage, to be run again.
        if mlflow.get_tracking_uri().startswith("sqlite:"):
            if _run_is_gone():
                raise UserError(
                    "The MLflow run was deleted while this stage logged to it. `dvc repro` goes on "
                    "after the last epoch of a training, and logs to a new run."
                ) from error
            raise
        _log.warning(
            "the MLflow server failed (%s): the rest of this stage is not logged. %s.",
            short_error(error),
            _SEND,
        )
        # Close the run, so that nothing waits for the server again.
        with suppress(MlflowException, RequestException):
            mlflow.end_run("FAILED")


def _run_is_gone() -> bool:
    run = mlflow.active_run()
    return run is not None and find_run_by_id(run.info.run_id) is None


def _end_dead_runs() -> None:
    running = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string="attributes.status = 'RUNNING'",
        output_format="list",
    )
    for run in running:
        if owner_is_gone(run.info.artifact_uri):
            MlflowClient().set_terminated(run.info.run_id, "KILLED")


def user_tag() -> dict[str, str]:
    """Return MLflow's tag for the user: the system account, not the login at its server."""
    try:
        return {MLFLOW_USER: getpass.getuser()}
    except (KeyError, OSError):  # in a container, the user may have no name
        return {MLFLOW_USER: "unknown"}


def find_run_by_id(run_id: str) -> Run | None:
    """Return a run, or None if this store does not have it or it was deleted."""
    try:
        run = mlflow.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None
