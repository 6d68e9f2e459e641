"""Preprocessing: decodes and resizes every image once, into the processed data.

It runs on all cores of this machine or of a Dask cluster, with the same bytes.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

import joblib
import numpy as np
import pandas as pd
from tqdm import tqdm

from facegender.data.decode_rows import decode_rows, write_rows
from facegender.data.manifest import write_table
from facegender.data.parallel_tasks import Where, run_tasks
from facegender.faces.detector import Face
from facegender.faces.settings import FaceCrop

_CHUNK = 64  # images a task: enough to pay for its dispatch, few enough to hold
_CHUNK_BYTES = 16_000_000  # most bytes that a task on a cluster returns

# The number of a task's images, and by row the reasons why some could not be decoded.
_Progress = Iterator[tuple[int, dict[int, str]]]


def write_split(
    manifest: pd.DataFrame,
    raw: Path,
    target: Path,
    *,
    size: int,
    name: str,
    crop: FaceCrop | None = None,
    faces: Mapping[str, Face | None] | None = None,
    border: int = 0,
    **where: Unpack[Where],
) -> list[dict[str, str]]:
    """Decode and resize the images of a manifest into the new directory `target`.

    With a border, the images are also written with it, into `wide.npy`. Memory does not grow with
    the number of images. The row of an undecodable image stays zero and is missing from the index.

    Args:
        manifest: columns `path` (relative to `raw`), `label`, `sha256` and any others.
        size: pixels a side.
        name: name of the split in the progress bar.
        crop: how faces are cut out; None takes whole images.
        faces: the face of each image by its path, with `crop`.
        border: that of `crop.cut_out`, for training that cuts at random; 0 for none.
        where: arguments of `parallel_tasks.run_tasks`.

    Returns:
        The `path` of each image that could not be decoded, and the `reason`, in order.

    Raises:
        UserError: as `parallel_tasks.run_tasks`, `write_rows` and `decode_rows` do.
    """
    target.mkdir(parents=True)
    cuts = [faces[path] for path in manifest["path"]] if faces and crop else []
    options: dict[str, Any] = {"size": size, "crop": crop, "faces": cuts, "border": 0}
    reasons = _write_array(manifest, raw, target / "images.npy", name, options, where)
    if border:
        options["border"] = border
        _write_array(manifest, raw, target / "wide.npy", f"{name}, wide", options, where)

    index = manifest.assign(row=np.arange(len(manifest))).drop(index=list(reasons))
    write_table(index, target / "index.csv")
    return [
        {"path": str(manifest["path"].iloc[row]), "reason": reasons[row]} for row in sorted(reasons)
    ]


def _write_array(
    manifest: pd.DataFrame, raw: Path, path: Path, name: str, options: dict[str, Any], where: Where
) -> dict[int, str]:
    """Write the images as an array, and return by row why some could not be decoded.

    `options` are those of `write_rows`, with `faces` for all images.
    """
    side = options["size"] + 2 * options["border"]
    shape = (len(manifest), side, side, 3)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    offset = array.offset
    del array
    write = _on_cluster if where.get("scheduler") else _on_this_machine
    reasons: dict[int, str] = {}
    with tqdm(total=len(manifest), desc=f"preprocess {name}", unit="image", mininterval=1) as bar:
        for done, failed in write(manifest, raw, path, offset, options, where):
            reasons |= failed
            bar.update(done)
    return reasons


def _on_this_machine(
    manifest: pd.DataFrame,
    raw: Path,
    array: Path,
    offset: int,
    options: dict[str, Any],
    where: Where,
) -> _Progress:
    """Write rows in processes of this machine, straight to disk."""
    tasks = (
        joblib.delayed(write_rows)(
            [raw / path for path in manifest["path"].iloc[start : start + _CHUNK]],
            array,
            offset=offset,
            first_row=start,
            **{**options, "faces": options["faces"][start : start + _CHUNK]},
        )
        for start in range(0, len(manifest), _CHUNK)
    )
    yield from run_tasks(tasks, **where)


def _on_cluster(
    manifest: pd.DataFrame,
    raw: Path,
    array: Path,
    offset: int,
    options: dict[str, Any],
    where: Where,
) -> _Progress:
    """Write rows that workers on other machines return.

    Workers do not write themselves: an NFS client that writes part of a page may send all of it,
    with old bytes of other rows; and a worker that was taken for dead could write into the data of
    a later run.
    """
    row_bytes = (options["size"] + 2 * options["border"]) ** 2 * 3
    chunk = max(1, min(_CHUNK, _CHUNK_BYTES // row_bytes))
    folder = raw.absolute()
    tasks = (
        joblib.delayed(decode_rows)(
            [folder / path for path in manifest["path"].iloc[start : start + chunk]],
            list(manifest["sha256"].iloc[start : start + chunk]),
            first_row=start,
            **{**options, "faces": options["faces"][start : start + chunk]},
        )
        for start in range(0, len(manifest), chunk)
    )
    with array.open("r+b") as file:
        for first_row, pixels, reasons in run_tasks(tasks, **where):
            file.seek(offset + first_row * row_bytes)
            file.write(pixels.data)
            yield len(pixels), reasons
