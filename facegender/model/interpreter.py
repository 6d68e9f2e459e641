"""LiteRT's interpreter, opened without its note about delegates."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ai_edge_litert.interpreter import Interpreter


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

    with _silent():
        # The runtime takes empty content for a missing argument.
        interpreter = Interpreter(model_content=content or b"\0", num_threads=threads)
        interpreter.allocate_tensors()
    return interpreter


@contextmanager
def _silent() -> Iterator[None]:
    """Discard what C++ code writes to standard error; its errors also arrive as exceptions.

    The runtime prints a line about its delegate, which cannot be switched off.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
