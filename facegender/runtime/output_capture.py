"""What a stage prints, kept for MLflow in case it fails."""

import sys
from collections import deque
from typing import TextIO

# The end of a longer log: there stands what went wrong.
KEPT_CHARACTERS = 1_000_000


class KeptOutput:
    """The end of what was printed."""

    def __init__(self) -> None:
        self._parts: deque[str] = deque()
        self._length = 0

    def add(self, text: str) -> None:
        """Keep a piece of text, and let go what is too old."""
        self._parts.append(text)
        self._length += len(text)
        while self._length > KEPT_CHARACTERS:
            self._length -= len(self._parts.popleft())

    def text(self) -> str:
        """Return what is kept."""
        return "".join(self._parts)


class _Tee:
    """A stream that is another in all but that what is written to it is kept as well."""

    def __init__(self, stream: TextIO, kept: KeptOutput) -> None:
        self._stream = stream
        self._kept = kept

    def write(self, text: str) -> int:
        self._kept.add(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def keep_output() -> KeptOutput:
    """Keep, from now on, what Python prints to standard output and error besides printing it."""
    kept = KeptOutput()
    sys.stdout = _Tee(sys.stdout, kept)  # type: ignore[assignment]
    sys.stderr = _Tee(sys.stderr, kept)  # type: ignore[assignment]
    return kept
