"""Capture a stage's output for MLflow in case it fails, and hide the notes of native code."""

import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

# Keep the end of a longer log: it says what went wrong.
KEPT_CHARACTERS = 1_000_000
# Prints the file that is its standard output, unless it is sent a character before its input ends.
_SHOW_UNLESS_TOLD = (
    "import os, sys; sys.stdin.read(1) or "
    "sys.stderr.buffer.write(os.pread(1, os.fstat(1).st_size, 0))"
)


class KeptOutput:
    """The end of the printed output."""

    def __init__(self) -> None:
        self._parts: deque[str] = deque()
        self._length = 0

    def add(self, text: str) -> None:
        """Keep a piece of text, and drop what is too old."""
        self._parts.append(text)
        self._length += len(text)
        while self._length - len(self._parts[0]) >= KEPT_CHARACTERS:
            self._length -= len(self._parts.popleft())

    def text(self) -> str:
        """Return the kept text."""
        return "".join(self._parts)[-KEPT_CHARACTERS:]


class _Tee:
    """A stream that passes text on to another, and keeps it."""

    def __init__(self, stream: TextIO, kept: KeptOutput) -> None:
        self._stream = stream
        self._kept = kept

    def write(self, text: str) -> int:
        self._kept.add(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def keep_output() -> KeptOutput:
    """From now on, keep what Python prints to standard output and error, and print it."""
    kept = KeptOutput()
    sys.stdout = _Tee(sys.stdout, kept)  # type: ignore[assignment]
    sys.stderr = _Tee(sys.stderr, kept)  # type: ignore[assignment]
    return kept


@contextmanager
def hide_native_notes() -> Iterator[None]:
    """Hide what the body writes to standard error, unless it fails.

    TensorFlow's C++ code writes notes that look like faults, and no setting turns them off. If the
    body raises or its process is aborted, all of it is shown: another process holds it.
    """
    with (
        tempfile.TemporaryFile() as notes,
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _SHOW_UNLESS_TOLD],
            stdin=subprocess.PIPE,
            stdout=notes,
            start_new_session=True,  # Ctrl-C is for this process
        ) as shower,
    ):
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(notes.fileno(), 2)
        try:
            yield
            shower.communicate(b".")
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
