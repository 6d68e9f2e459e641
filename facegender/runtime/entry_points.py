"""How commands and stages start and end: logging, signals, exit codes, errors as sentences."""

import errno
import gc
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from facegender.errors import UserError
from facegender.runtime.dvc_context import project_root, run_name_and_tags, tracking_uri
from facegender.runtime.output_capture import keep_output
from facegender.runtime.packages import check_packages
from facegender.runtime.redaction import (
    SanitizingFormatter,
    first_line,
    move_tracking_credentials,
    sanitized,
    secrets_of,
    without_credentials,
)
from facegender.runtime.user_settings import drop_user_settings, restart_without_early_settings

_KEPT = "; `dvc repro` continues: finished stages are kept, and so are epochs of a training"
_python_shows = warnings.showwarning

_log = logging.getLogger("facegender")


class _Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so no code handles it as a failure to recover from."""


def _terminate(*_: object) -> None:
    # Ignore further SIGTERMs while printing the message.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated


def run_command(main: Callable[[], int | None], kept: str = "") -> None:
    """Run `main` and exit with its code.

    The code is 1 after an error, 130 after Ctrl-C, 143 after SIGTERM. A UserError is shown as one
    paragraph, a bug as a traceback; logs and errors are `sanitized`.

    Args:
        kept: end of the sentence about an interruption, with what to do next.
    """
    signal.signal(signal.SIGTERM, _terminate)
    # TensorFlow and MLflow create a million permanent objects. Collecting garbage after every 700
    # takes an eighth of their import time.
    gc.set_threshold(50_000)
    move_tracking_credentials(os.environ)
    dropped = drop_user_settings(os.environ)
    # Hide TensorFlow's notes on its build; its errors still arrive as exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.showwarning = _show_warning
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLflow sends usage telemetry by default.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow prints the traceback of a database error that it also raises.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # If a server is down, MLflow's defaults delay a stage by a quarter of an hour. These make it 15
    # seconds if the server refuses, two minutes if it is silent.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    handler = logging.StreamHandler()
    handler.setFormatter(SanitizingFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("facegender").setLevel(logging.INFO)
    if dropped:
        _log.info("not used, because results must not depend on them: %s", ", ".join(dropped))
    try:
        sys.exit(main())
    except UserError as error:
        print(sanitized(f"error: {error}"), file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if _is_full_disk(error):
            print(f"error: The disk is full: free some space{kept}.", file=sys.stderr)
        else:
            print(sanitized(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"interrupted{kept}", file=sys.stderr)
        sys.exit(130)
    except _Terminated:
        print(f"terminated{kept}", file=sys.stderr)
        sys.exit(143)
    finally:
        # Otherwise Python looks for garbage among all objects once more as it ends, which takes a
        # second if TensorFlow was imported.
        gc.freeze()


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, *rest: Any, **named: Any
) -> None:
    """Print a warning, except MLflow's hints to programmers, which override filters."""
    if not (category is UserWarning and "mlflow" in Path(filename).parts):
        _python_shows(message, category, filename, *rest, **named)


def _is_full_disk(error: BaseException) -> bool:
    """Return whether the disk was full, whichever library wrapped the error."""
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return True
    # SQLite's words, and those of libraries that keep only the text.
    if "disk is full" in str(error) or os.strerror(errno.ENOSPC) in str(error):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and _is_full_disk(cause)


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's `main` as a command. If it fails, its MLflow run is FAILED and has its log.

    DVC removes the folder of a failed temporary experiment with everything that it printed.
    """
    restart_without_early_settings()
    output = keep_output()

    def guarded() -> None:
        try:
            if os.environ.get("DVC_STAGE"):
                check_packages(Path("conf/packages.yaml"))
            main()
        except (Exception, KeyboardInterrupt, _Terminated) as error:
            # After an early Ctrl-C, do not import MLflow first.
            early = "facegender.tracking.connection" not in sys.modules
            if not (early and isinstance(error, KeyboardInterrupt)):
                _keep_failure(output.text())
            raise

    run_command(guarded, _KEPT)


def _keep_failure(printed: str) -> None:
    """Log the output and the exception that is being handled to MLflow."""
    secrets = secrets_of(os.environ)
    log = without_credentials(printed + traceback.format_exc(), secrets)
    try:
        from facegender.tracking import connection, runs

        connection.connect(project_root(), tracking_uri())
        name, tags = run_name_and_tags()
        runs.log_failure(
            log, stage=Path(sys.argv[0]).stem, name=name, tags=tags, params=_params_here()
        )
    except Exception as problem:  # the stage's own error matters more
        _log.warning("MLflow has no log of this failure: %s", first_line(problem, secrets))


def _params_here() -> dict[str, Any]:
    from facegender.params import flatten, load_params

    try:
        return dict(flatten(load_params(Path("params.yaml"))))
    except UserError:
        return {}
