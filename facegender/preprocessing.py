"""Preprocessing: decode and resize every image once, on all cores, into the processed data."""

from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from tqdm import tqdm

from facegender.images import InvalidImage, decode_image
from facegender.manifest import write_manifest

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

    paths = [raw / path for path in manifest["path"]]
    tasks = (
        joblib.delayed(_write_rows)(paths[start : start + _CHUNK], array_path, offset, start, size)
        for start in range(0, len(paths), _CHUNK)
    )
    reasons: dict[int, str] = {}
    with tqdm(total=len(paths), desc=f"preprocess {name}", unit="image", mininterval=1) as bar:
        for done, failed in joblib.Parallel(jobs, return_as="generator_unordered")(tasks):
            reasons |= failed
            bar.update(done)

    index = manifest.assign(row=np.arange(len(manifest))).drop(index=list(reasons))
    write_manifest(index, target / "index.csv")
    return [
        {"path": str(manifest["path"].iloc[row]), "reason": reasons[row]} for row in sorted(reasons)
    ]


def _write_rows(
    paths: list[Path], array_path: Path, offset: int, start: int, size: int
) -> tuple[int, dict[int, str]]:
    """Decode a chunk into its rows; return how many were tried and the reasons of failures."""
    reasons = {}
    row_bytes = size * size * 3
    # Plain writes, not a memory map: mapped pages would count as this process's memory.
    with array_path.open("r+b") as file:
        for row, path in enumerate(paths, start):
            try:
                pixels = decode_image(path, size)
            except InvalidImage as error:
                reasons[row] = str(error)
                continue
            file.seek(offset + row * row_bytes)
            file.write(pixels.tobytes())
    return len(paths), reasons
