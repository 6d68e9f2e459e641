"""Preprocessing: decode and resize every image once, on all cores, into the processed data."""

from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from tqdm import tqdm

from facegender.manifest import write_manifest
from facegender.rows import write_rows

_CHUNK = 64  # images a task: enough to pay for its dispatch, little to hold


def write_part(
    manifest: pd.DataFrame, raw: Path, target: Path, *, size: int, name: str, jobs: int = -1
) -> list[dict[str, str]]:
    """Decode and resize the images of a manifest into the new directory `target`.

    Workers write rows of the array straight to disk, so memory does not grow with the number of
    images. The row of an undecodable image stays zero and is missing from the index.

    Args:
        manifest: columns `path` (relative to `raw`), `label`, `sha256` and any others.
        raw: directory of the raw data.
        target: directory to make.
        size: pixels a side.
        name: what the progress bar calls this part.
        jobs: processes; -1 for one a core.

    Returns:
        For each image that could not be decoded, its `path` and the `reason`, in order.
    """
    target.mkdir(parents=True)
    array_path = target / "images.npy"
    shape = (len(manifest), size, size, 3)
    array = np.lib.format.open_memmap(array_path, mode="w+", dtype=np.uint8, shape=shape)
    offset = array.offset
    del array

    tasks = (
        joblib.delayed(write_rows)(
            [raw / path for path in manifest["path"].iloc[start : start + _CHUNK]],
            array_path,
            offset=offset,
            first_row=start,
            size=size,
        )
        for start in range(0, len(manifest), _CHUNK)
    )
    reasons: dict[int, str] = {}
    with tqdm(total=len(manifest), desc=f"preprocess {name}", unit="image", mininterval=1) as bar:
        for done, failed in joblib.Parallel(jobs, return_as="generator_unordered")(tasks):
            reasons |= failed
            bar.update(done)

    index = manifest.assign(row=np.arange(len(manifest))).drop(index=list(reasons))
    write_manifest(index, target / "index.csv")
    return [
        {"path": str(manifest["path"].iloc[row]), "reason": reasons[row]} for row in sorted(reasons)
    ]
