import errno
import logging
from unittest.mock import Mock

import pytest

from facegender.errors import UserError
from facegender.runtime.entry_points import run_command
from facegender.runtime.redaction import escape_controls, sanitized
from tests.conftest import run_python
from tools.ui import _check_port


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain é 顔.png", "plain é 顔.png"),
        ("\x1b]0;title\x07\x1b[2J.png", r"\x1b]0;title\x07\x1b[2J.png"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\udcff.png", r"\udcff.png"),
        ("\x7f\x00", r"\x7f\x00"),
    ],
)
def test_control_characters_are_escaped(text: str, expected: str) -> None:
    assert escape_controls(text) == expected
    assert escape_controls(text).isprintable()


def test_paragraphs_keep_their_line_breaks() -> None:
    assert sanitized("one\ntwo\x1b[2J\n") == "one\ntwo\\x1b[2J\n"


@pytest.mark.parametrize("kind", [UserError, RuntimeError])
def test_an_error_shows_no_secret_and_moves_no_cursor(
    kind: type[Exception], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAGGLE_KEY", "canary-key")
    cause = ValueError("canary-key in the cause")

    def main() -> None:
        raise kind("with canary-key, \x1b[2J and http://ada:canary@host") from cause

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert r"with ***, \x1b[2J and http://***@host" in error
    assert ("Traceback" in error) == (kind is RuntimeError)
    assert "canary" not in error  # nor do the lines of code that a traceback quotes


def test_a_log_shows_no_secret_either(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "canary-token")
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])

    def main() -> int:
        logging.getLogger("facegender").warning("%s of %s", "canary-token", "\x1b[2J")
        return 3

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 3
    assert capsys.readouterr().err == "WARNING: *** of \\x1b[2J\n"


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "full"), 1, "error: The disk is full: free some space."),
    ],
)
def test_only_a_stage_says_that_dvc_continues(
    error: BaseException, code: int, shown: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_command(Mock(side_effect=error))
    assert stop.value.code == code
    assert capsys.readouterr().err == f"{shown}\n"


def test_a_port_that_does_not_exist_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="Port 70000 cannot be used"):
        _check_port(70_000)


@pytest.mark.parametrize(
    ("end", "shown"),
    [
        ("pass", []),
        ("raise RuntimeError('failed')", ["native note", "python note", "RuntimeError: failed"]),
        ("os.abort()", ["native note", "python note"]),
    ],
)
def test_native_notes_are_shown_by_what_fails_alone(end: str, shown: list[str]) -> None:
    code = f"""
import os, sys
from facegender.runtime.output_capture import hide_native_notes
with hide_native_notes():
    os.write(2, b"native note\\n")
    print("python note", file=sys.stderr)
    {end}
print("after", file=sys.stderr)
"""
    done = run_python(code, check=False)
    printed = done.stderr.splitlines()
    assert [line for line in shown if line not in printed] == []
    assert ("after" in printed) == (end == "pass") == (len(printed) == 1)


def test_packages_are_hidden_in_the_body_alone_unless_imported_before() -> None:
    code = """
import colorsys
from facegender.runtime.optional_packages import without_packages
with without_packages("colorsys", "wave"):
    import colorsys
    try:
        import wave
    except ModuleNotFoundError:
        print("hidden")
import wave
"""
    assert run_python(code).stdout == "hidden\n"


@pytest.mark.parametrize("end", ["pass", "raise RuntimeError"])
def test_a_command_does_not_look_for_garbage_as_it_ends(end: str) -> None:
    code = f"""
import atexit, gc
from facegender.runtime.entry_points import run_command
atexit.register(lambda: print(gc.get_freeze_count() > 0))
def main():
    {end}
run_command(main)
"""
    assert run_python(code, check=False).stdout == "True\n"


def test_mlflows_hints_to_programmers_are_not_shown() -> None:
    code = """
import warnings
from facegender.runtime.entry_points import run_command
def main():
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # as MLflow does around its hints
        warnings.warn_explicit("a hint", UserWarning, "/lib/mlflow/pyfunc/model.py", 1)
        warnings.warn_explicit("a fault", UserWarning, "/lib/numpy/core.py", 1)
run_command(main)
"""
    done = run_python(code)
    assert done.stderr == "/lib/numpy/core.py:1: UserWarning: a fault\n"
