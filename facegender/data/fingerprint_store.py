"""Fingerprints of all images: a few bytes each in memory, the thumbnails in a file."""

import mmap
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import joblib
import numpy as np
import pandas as pd
from tqdm import tqdm

from facegender.data.fingerprints import THUMBNAIL_SIZE, take_fingerprints
from facegender.data.parallel_tasks import Where, run_tasks

_CHUNK = 64  # images a task
_SHAPE = (THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3)


class Thumbnails:
    """Rows of a file, indexed like an array of shape (n, 32, 32, 3)."""

    def __init__(self, file: Any, rows: np.ndarray) -> None:
        self._file, self._rows = file, rows

    def __len__(self) -> int:  # noqa: D105
        return len(self._rows)

    def __getitem__(self, index: Any) -> np.ndarray:  # noqa: D105
        # Mapped for this access only, because mapped pages count as this process's memory.
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            return np.ndarray((pages.size() // int(np.prod(_SHAPE)), *_SHAPE), np.uint8, pages)[
                self._rows[index]
            ]

    def take(self, rows: np.ndarray) -> "Thumbnails":
        """Return some of the thumbnails."""
        return Thumbnails(self._file, self._rows[rows])


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints of the images of a manifest, by row.

    Attributes:
        measures: int32 (n, 3): width, height and contrast, as `take_fingerprints` returns them.
        thumbnails: uint8 (n, 32, 32, 3).
        reasons: why an image cannot be decoded, by row.
    """

    measures: np.ndarray
    thumbnails: Thumbnails
    reasons: Mapping[int, str]

    def take(self, rows: np.ndarray) -> "Fingerprints":
        """Return the fingerprints of some rows, all of which could be decoded."""
        return Fingerprints(self.measures[rows], self.thumbnails.take(rows), {})


def fingerprint_images(
    manifest: pd.DataFrame,
    raw: Path,
    *,
    scratch: Path | None = None,
    **where: Unpack[Where],
) -> Fingerprints:
    """Decode every image at a small size.

    Args:
        manifest: columns `path` (relative to `raw`), `sha256` and any others.
        scratch: directory of the temporary file for the thumbnails, 3 KB an image; by default the
            system's.
        where: arguments of `parallel_tasks.run_tasks`.

    Raises:
        UserError: as `parallel_tasks.run_tasks` and `take_fingerprints` do.
    """
    n = len(manifest)
    folder = raw.absolute()
    paths, digests = manifest["path"], manifest["sha256"]
    tasks = (
        joblib.delayed(take_fingerprints)(
            [folder / path for path in paths.iloc[start : start + _CHUNK]],
            list(digests.iloc[start : start + _CHUNK]) if where.get("scheduler") else None,
            first_row=start,
        )
        for start in range(0, n, _CHUNK)
    )
    file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - open as long as it is used
    file.truncate(n * int(np.prod(_SHAPE)))
    measures = np.zeros((n, 3), np.int32)
    reasons: dict[int, str] = {}
    with tqdm(total=n, desc="check", unit="image", mininterval=1) as bar:
        for first, measured, thumbnails, failed in run_tasks(tasks, **where):
            measures[first : first + len(measured)] = measured
            file.seek(first * int(np.prod(_SHAPE)))
            file.write(thumbnails.data)
            reasons |= failed
            bar.update(len(measured))
    file.flush()
    return Fingerprints(measures, Thumbnails(file, np.arange(n)), dict(sorted(reasons.items())))
