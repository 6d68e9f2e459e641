"""What every command of the project does: log plainly, and explain errors instead of crashing."""

import errno
import gc
import hashlib
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from facegender.errors import UserError
from facegender.runtime.output_capture import keep_output
from facegender.runtime.redaction import move_tracking_credentials, secrets_of, without_credentials

# A sweep names its own run in it to the stages of its experiments.
PARENT_RUN = "FACEGENDER_PARENT_RUN"
# Seconds in which all workers of a training must be there.
WORKER_WAIT = "FACEGENDER_WORKER_WAIT"

_KEPT = "`dvc repro` goes on: stages that ended are kept, and epochs of a training"

_log = logging.getLogger("facegender")


class _Terminated(BaseException):
    """SIGTERM came. Not an Exception, so that nothing takes it for a failure to recover from."""


def _terminate(*_: object) -> None:
    # Once is enough: what is left to do is to say so.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated


def run_command(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its code.

    It is 1 after one paragraph for a UserError, 130 for Ctrl-C, 143 for SIGTERM. Logs and errors,
    tracebacks of bugs included, go through `presentable`.
    """
    signal.signal(signal.SIGTERM, _terminate)
    # TensorFlow and MLflow make a million objects that stay. To look through them for garbage after
    # every 700 takes an eighth of the time in which they are imported.
    gc.set_threshold(50_000)
    move_tracking_credentials(os.environ)
    # TensorFlow greets with pages of notes on its build; its errors still arrive as exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # MLflow's hints on how to call it are for whoever writes the code, not for who runs it.
    warnings.filterwarnings("ignore", category=UserWarning, module="mlflow")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # By default it tells its makers how it is used.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # It prints the traceback of a database's error, which it raises as well.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # A server that is down should not hold a stage up for the quarter of an hour that is MLflow's
    # default: 15 seconds if it refuses, two minutes if it is silent.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    handler = logging.StreamHandler()
    handler.setFormatter(_PresentableFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("facegender").setLevel(logging.INFO)
    try:
        sys.exit(main())
    except UserError as error:
        print(presentable(f"error: {error}"), file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if _is_full_disk(error):
            print(f"error: The disk is full. Make room; then {_KEPT}.", file=sys.stderr)
        else:
            print(presentable(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"interrupted; {_KEPT}", file=sys.stderr)
        sys.exit(130)
    except _Terminated:
        print(f"terminated; {_KEPT}", file=sys.stderr)
        sys.exit(143)


def _is_full_disk(error: BaseException) -> bool:
    """Return whether no space was left, whatever library wrapped the error that says so."""
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return True
    # SQLite's words, and those of libraries that keep the text alone.
    if "disk is full" in str(error) or os.strerror(errno.ENOSPC) in str(error):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and _is_full_disk(cause)


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's `main` as a command. If it fails, MLflow keeps a run FAILED with its log.

    DVC removes the folder of a temporary experiment that failed, and all that it printed.
    """
    output = keep_output()

    def guarded() -> None:
        try:
            main()
        except (Exception, KeyboardInterrupt, _Terminated) as error:
            # Who presses Ctrl-C early does not want to wait for MLflow.
            early = "facegender.tracking.runs" not in sys.modules
            if not (early and isinstance(error, KeyboardInterrupt)):
                _keep_failure(output.text())
            raise

    run_command(guarded)


def _keep_failure(printed: str) -> None:
    """Log what was printed, and the exception that is being handled, to MLflow."""
    secrets = secrets_of(os.environ)
    log = without_credentials(printed + traceback.format_exc(), secrets)
    try:
        from facegender.tracking import runs as tracking

        tracking.connect(project_root(), tracking_uri())
        name, tags = run_name_and_tags()
        tracking.log_failure(
            log, stage=Path(sys.argv[0]).stem, name=name, tags=tags, params=_params_here()
        )
    except Exception as problem:  # the stage's own error matters more
        text = without_credentials(str(problem), secrets)
        _log.warning("MLflow has no log of this failure: %s", text)


def _params_here() -> dict[str, Any]:
    from facegender.params import flatten, load_params

    try:
        return dict(flatten(load_params(Path("params.yaml"))))
    except UserError:
        return {}


def presentable(text: str) -> str:
    """Return the text as it may be shown: without credentials, and nothing in it moves a cursor.

    Error messages of libraries hold addresses with passwords; names of files that came in an
    archive hold what their maker liked, escape sequences of terminals too.
    """
    blanked = without_credentials(text, secrets_of(os.environ))
    return "\n".join(escape_controls(line) for line in blanked.split("\n"))


def escape_controls(text: str) -> str:
    """Return the text with characters that are not printable written as escapes, such as `\\x1b`.

    Among them are line breaks, marks that turn the direction of writing, and bytes of a file's
    name that are no text.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


class _PresentableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return presentable(super().format(record))


def project_root() -> Path:
    """Return the root of the repository that this command belongs to.

    DVC runs temporary experiments in a copy below `.dvc/tmp` and names the repository itself in
    DVC_ROOT; outside DVC it is the nearest folder upwards with a `.dvc` directory.

    Raises:
        UserError: there is none.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / ".dvc").is_dir():
            return folder
    raise UserError(f"{here} is not inside a clone of facegender: no folder above it has .dvc/.")


def pipeline_paths(dvc_yaml: str) -> dict[str, str]:
    """Return the paths of the pipeline's files by the names that the text of dvc.yaml gives them.

    Raises:
        LookupError, TypeError or yaml.YAMLError: the text is another one's.
    """
    import yaml

    return yaml.safe_load(dvc_yaml)["vars"][0]["path"]


def tracking_uri() -> str | None:
    """Return the tracking server that MLFLOW_TRACKING_URI names, or None for the local store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def worker_wait() -> float:
    """Return how long worker 0 waits for the others, in seconds: 900, or what the user says.

    Raises:
        UserError: FACEGENDER_WORKER_WAIT is no number above 0.
    """
    text = os.environ.get(WORKER_WAIT) or "900"
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"{WORKER_WAIT}={text!r} is no number of seconds, such as 900.")
    return int(text)


def run_name_and_tags() -> tuple[str, dict[str, str]]:
    """Return a name for this execution's MLflow run, and tags that tie it to its experiment.

    DVC names experiments, and their baseline commit, in the environment of the stages. (The commit
    itself is a tag of MLflow's own.)
    """
    experiment = os.environ.get("DVC_EXP_NAME", "")
    tags = {
        "dvc.exp_name": experiment,
        "dvc.exp_baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV", ""),
        "mlflow.parentRunId": os.environ.get(PARENT_RUN, ""),
    }
    return experiment or "repro", {key: value for key, value in tags.items() if value}


def input_tags(lock: Path, stages: Sequence[str]) -> dict[str, str]:
    """Return tags for what DVC knows of a run's inputs; none if there is no dvc.lock.

    `dvc.data` is the digest of the raw images, as it stands in dvc.lock. `dvc.lock` is one SHA-256
    of commands, inputs and parameters as dvc.lock has them. Outputs are left out, for some differ
    from run to run; and so are other stages, whose entries change while the pipeline runs.

    Args:
        lock: the file dvc.lock.
        stages: those that have run: DVC writes the entry of a stage when it has ended.
    """
    import yaml  # here, as other imports in this module: a quick command should not wait for them

    if not lock.is_file():
        return {}
    entries = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
    known = {stage: entries[stage] for stage in stages if stage in entries}
    inputs = {
        stage: {
            "cmd": entry["cmd"],
            "deps": {dep["path"]: dep.get("md5") for dep in entry.get("deps", [])},
            "params": entry.get("params", {}),
        }
        for stage, entry in known.items()
    }
    text = json.dumps(inputs, sort_keys=True)
    tags = {"dvc.lock": hashlib.sha256(text.encode()).hexdigest()}
    for out in known.get("download", {}).get("outs", []):
        if out["md5"].endswith(".dir"):
            tags["dvc.data"] = out["md5"]
    return tags


def check_inputs(lock: Path, inputs: Sequence[Path]) -> None:
    """Refuse, in a stage that DVC runs, inputs that are not what dvc.lock records.

    A stage that is run by hand may be given anything.

    Args:
        lock: the file dvc.lock.
        inputs: files and directories.

    Raises:
        UserError: names the files.
    """
    from facegender.runtime import integrity

    if os.environ.get("DVC_STAGE"):
        integrity.check_inputs(lock, inputs)


def fit_verbosity() -> int:
    """Return Keras' `verbose`: a bar by step on a terminal, a line an epoch in a log."""
    return 1 if sys.stdout.isatty() else 2
