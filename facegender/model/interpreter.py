"""LiteRT's interpreter, opened without its note about delegates."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ai_edge_litert.interpreter import Interpreter

_FIRST = threading.Lock()
_note_is_printed = False


def open_interpreter(content: bytes, *, threads: int = 1) -> Interpreter:
    """Return the interpreter of a `.tflite` model.

    Args:
        content: bytes of the model.
        threads: number of threads of the computation.

    Raises:
        ValueError, RuntimeError: the content is damaged or another kind of file.
    """
    # Imported here because a Keras model does not need this runtime.
    from ai_edge_litert.interpreter import Interpreter

    with _first_in_silence():
        # The runtime mistakes empty content for a missing argument.
        interpreter = Interpreter(model_content=content or b"\0", num_threads=threads)
        interpreter.allocate_tensors()
    return interpreter


@contextmanager
def _first_in_silence() -> Iterator[None]:
    """Discard what C++ code writes to standard error until the process has opened an interpreter.

    The runtime then prints a line about its delegate, which cannot be switched off. Its errors also
    arrive as exceptions. Later interpreters print nothing, and are opened in threads: what other
    threads print meanwhile must not be lost.
    """
    global _note_is_printed
    with _FIRST:
        if not _note_is_printed:
            with _silent():
                yield
            _note_is_printed = True
            return
    yield


@contextmanager
def _silent() -> Iterator[None]:
    """Discard what is written to standard error; one thread at a time."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
