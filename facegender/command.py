"""What every command of the project does: log plainly, and explain errors instead of crashing."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from facegender.credentials import (
    move_tracking_credentials,
    secrets_of,
    without_credentials,
)
from facegender.errors import UserError


def run_command(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its code: 1 and one paragraph for a UserError, 130 for Ctrl-C.

    Logs and errors, tracebacks of bugs included, go through `presentable`.
    """
    move_tracking_credentials(os.environ)
    # TensorFlow greets with pages of notes on its build; its errors still arrive as exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # MLflow's hints on how to call it are for whoever writes the code, not for who runs it.
    warnings.filterwarnings("ignore", category=UserWarning, module="mlflow")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # By default it tells its makers how it is used.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    handler = logging.StreamHandler()
    handler.setFormatter(_PresentableFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("facegender").setLevel(logging.INFO)
    try:
        sys.exit(main())
    except UserError as error:
        print(presentable(f"error: {error}"), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; what earlier stages made is kept", file=sys.stderr)
        sys.exit(130)
    except Exception:
        print(presentable(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(1)


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


def tracking_uri() -> str | None:
    """Return the tracking server that MLFLOW_TRACKING_URI names, or None for the local store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def run_name_and_tags() -> tuple[str, dict[str, str]]:
    """Return a name for this execution's MLflow run, and tags that tie it to its experiment.

    DVC names experiments, and their baseline commit, in the environment of the stages.
    """
    experiment = os.environ.get("DVC_EXP_NAME", "")
    baseline = os.environ.get("DVC_EXP_BASELINE_REV", "")
    tags = {"dvc.exp_name": experiment, "dvc.exp_baseline_rev": baseline}
    return experiment or "repro", {key: value for key, value in tags.items() if value}


def fit_verbosity() -> int:
    """Return Keras' `verbose`: a bar by step on a terminal, a line an epoch in a log."""
    return 1 if sys.stdout.isatty() else 2
