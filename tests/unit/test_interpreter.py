"""What other threads write to standard error while models are loaded is kept."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from facegender.model import interpreter


class StandIn:
    """An interpreter that takes its time to load, and writes as the runtime does."""

    def __init__(self, model_content: bytes, num_threads: int) -> None:
        os.write(2, b"a note\n")
        time.sleep(float(model_content))

    def allocate_tensors(self) -> None:
        pass


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ai_edge_litert.interpreter.Interpreter", StandIn)
    monkeypatch.setattr(interpreter, "_note_is_printed", False)


def test_only_the_first_model_is_loaded_in_silence(capfd: pytest.CaptureFixture) -> None:
    interpreter.open_interpreter(b"0")
    assert capfd.readouterr().err == ""
    interpreter.open_interpreter(b"0")
    assert capfd.readouterr().err == "a note\n"


def test_two_threads_that_load_leave_standard_error_as_it_was(
    capfd: pytest.CaptureFixture,
) -> None:
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(interpreter.open_interpreter, b"0.2")
        time.sleep(0.1)
        second = pool.submit(interpreter.open_interpreter, b"0.3")
        for opened in (first, second):
            opened.result()
    capfd.readouterr()
    os.write(2, b"kept\n")
    assert capfd.readouterr().err == "kept\n"
