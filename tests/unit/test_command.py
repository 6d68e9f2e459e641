import logging

import pytest

from facegender.errors import UserError
from facegender.runtime.entry_points import run_command
from facegender.runtime.redaction import escape_controls, sanitized


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
