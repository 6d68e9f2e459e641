"""Checkpoints: what a killed training needs to resume and end with the same bytes.

A training has one file, replaced after each epoch by a rename, so it is never half-written. Its
name is a digest of all that decides the result, so no other training uses it.
"""

import hashlib
import io
import json
import logging
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
from filelock import FileLock, Timeout

from facegender.data.processed import ProcessedSplit
from facegender.files import file_sha256
from facegender.params import Params

# Older checkpoints are removed: nobody resumed their training.
MAX_AGE_DAYS = 14

# Code that decides a training's result. An edit of a log line or the gate keeps checkpoints valid.
DECISIVE_CODE = ("model", "training", "data/processed.py", "data/manifest.py")
DECISIVE_PARAMS = {"image", "model", "train"}
_PACKAGES = ("keras", "numpy", "tensorflow")
_NOTES = "notes"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A checkpoint's content.

    Attributes:
        arrays: arrays by name, of any dtype.
        notes: whatever JSON can hold; floats keep every bit.
    """

    arrays: dict[str, np.ndarray]
    notes: dict[str, Any]


class Checkpoint:
    """The file of one training.

    Attributes:
        run_id: id of the MLflow run, saved in each checkpoint; None before there is one.
    """

    def __init__(self, path: Path | None) -> None:
        """Load what an earlier process saved at `path`; without a path nothing is saved."""
        self._path = path
        self.saved = _read(path) if path is not None and path.is_file() else None
        self.run_id: str | None = self.saved.notes["run_id"] if self.saved else None

    @classmethod
    def received(cls, content: bytes) -> Self:
        """Return the checkpoint of another process, from its `content`; it is not saved here."""
        checkpoint = cls(None)
        checkpoint.saved = _read(io.BytesIO(content)) if content else None
        return checkpoint

    def content(self) -> bytes:
        """Return what was loaded, as bytes for `received`; empty if there was nothing."""
        return self._path.read_bytes() if self._path is not None and self.saved else b""

    def write(self, arrays: dict[str, np.ndarray], notes: dict[str, Any]) -> None:
        """Replace the file atomically. If the disk is full, training goes on without it."""
        if self._path is None:
            return
        temporary = self._path.with_suffix(".partial")
        text = json.dumps({**notes, "run_id": self.run_id})
        content: dict[str, Any] = {**arrays, _NOTES: np.frombuffer(text.encode(), np.uint8)}
        try:
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            _log.warning(
                "no checkpoint of this epoch, because it could not be written: %s. If training is "
                "interrupted, it continues from an earlier one",
                error,
            )

    def remove(self) -> None:
        """Remove the file of a training that has ended well."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _read(file: Path | io.BytesIO) -> Saved | None:
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        notes = json.loads(arrays.pop(_NOTES).tobytes())
    # EOFError: empty, as after a power cut. RuntimeError: a flipped bit means encrypted or packed.
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
        _log.warning("the checkpoint cannot be read, so training starts again: %s", error)
        return None
    return Saved(arrays, notes)


@contextmanager
def open_checkpoint(folder: Path, digest: str) -> Iterator[Checkpoint]:
    """Open the checkpoint of the training that `digest` names; only one process can have it open.

    If another process has it (two equal experiments), this one gets a checkpoint that is not saved:
    it must not resume the other's run.

    Args:
        folder: folder of all checkpoints; created if missing, and cleared of old ones.
        digest: from `inputs_digest`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    oldest = time.time() - MAX_AGE_DAYS * 24 * 3600
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another training clears the folder, too
            if path.stat().st_mtime < oldest:
                path.unlink()
    lock = FileLock(folder / f"{digest}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("another process runs the same training, so this one saves no checkpoint")
        yield Checkpoint(None)
        return
    try:
        yield Checkpoint(folder / f"{digest}.npz")
    finally:
        lock.release()


def inputs_digest(
    params: Params, splits: Sequence[ProcessedSplit], package: Path = Path(__file__).parents[1]
) -> str:
    """Return the SHA-256, 64 hexadecimal digits, of everything that decides a training's result.

    Args:
        params: all parameters, of which DECISIVE_PARAMS count.
        splits: training and validation split.
        package: directory of facegender's code, of which DECISIVE_CODE counts.
    """
    files = [file for split in splits for file in split.files]
    weights = Path(params.model.weights)
    if weights.is_file():
        files.append(weights)
    for name in DECISIVE_CODE:
        code = package / name
        files += [code] if code.suffix == ".py" else sorted(code.glob("*.py"))
    lines = [params.model_dump_json(include=DECISIVE_PARAMS)]
    lines += [f"{name} {version(name)}" for name in _PACKAGES]
    lines += [f"{path.name} {file_sha256(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
