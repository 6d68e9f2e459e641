"""Print the gate's verdict and return its exit code, which CI trusts."""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Literal

from facegender.errors import UserError
from facegender.gate.verdict import Report, as_markdown, as_text
from facegender.runtime.redaction import sanitized


def print_verdict(judge: Callable[[], Report], form: Literal["text", "markdown", "json"]) -> int:
    """Judge, print the report, and return the exit code.

    Exit code 1 means that the model is worse, so whatever prevents a verdict, or prevents printing
    it, is exit code 2. A reader that closes the pipe has read enough: the verdict stands.
    """
    try:
        report = judge()
        if form == "json":
            text = json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"
        else:
            text = {"text": as_text, "markdown": as_markdown}[form](report)
    except (UserError, OSError) as error:
        print(sanitized(f"error: {error}"), file=sys.stderr)
        return 2
    except Exception:
        print(sanitized(traceback.format_exc()), end="", file=sys.stderr)
        return 2
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
    except OSError as error:
        _drop_output()
        print(f"error: Cannot write the verdict: {error.strerror}", file=sys.stderr)
        return 2
    return report.exit_code


def _drop_output() -> None:
    """Redirect standard output to the null device, or Python's flush at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
