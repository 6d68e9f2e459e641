"""The table of the faces found in each image of the data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Unpack

import joblib
import pandas as pd
from tqdm import tqdm

from facegender.data.decode_rows import locate_faces
from facegender.data.given_boxes import Box
from facegender.data.manifest import COLUMNS, read_manifest
from facegender.data.parallel_tasks import Where, run_tasks
from facegender.faces.detector import Face
from facegender.faces.settings import FaceCrop

_CHUNK = 16  # images a task
_MOST_GROUPS = 50  # a column with more values may be an identifier
_BOX = [field.name for field in fields(Face)]


def find_all_faces(
    manifest: pd.DataFrame,
    raw: Path,
    crop: FaceCrop,
    *,
    boxes: Mapping[str, Sequence[Box]] | None = None,
    **where: Unpack[Where],
) -> pd.DataFrame:
    """Find the faces in every image.

    Args:
        manifest: columns `path` (relative to `raw`), `sha256` and any others.
        boxes: boxes of faces by path, taken if usable.
        where: arguments of `parallel_tasks.run_tasks`.

    Returns:
        A row for each image: `path`, `faces` (their number) and the fields of the largest `Face`,
        empty if there is none. An image that cannot be decoded has no face. With `boxes` also
        `bad_box`: what is wrong with the image's box, if anything.
    """
    folder = raw.absolute()
    paths, digests = [folder / path for path in manifest["path"]], manifest["sha256"]
    given = None if boxes is None else [list(boxes.get(path, ())) for path in manifest["path"]]
    tasks = (
        joblib.delayed(locate_faces)(
            paths[start : start + _CHUNK],
            crop,
            first_row=start,
            digests=list(digests.iloc[start : start + _CHUNK]) if where.get("scheduler") else None,
            boxes=None if given is None else given[start : start + _CHUNK],
        )
        for start in range(0, len(paths), _CHUNK)
    )
    rows: list[dict[str, Any]] = [{} for _ in paths]
    with tqdm(total=len(paths), desc="find faces", unit="image", mininterval=1) as bar:
        for first_row, chunk in run_tasks(tasks, **where):
            for row, (found, problem) in enumerate(chunk, first_row):
                largest = asdict(found[0]) if found else {}
                rows[row] = {"faces": len(found), "bad_box": problem, **largest}
            bar.update(len(chunk))
    columns = ["faces", *_BOX, *(["bad_box"] if boxes is not None else [])]
    table = pd.DataFrame(rows, columns=columns)
    table.insert(0, "path", manifest["path"].to_numpy())
    return table


def read_faces(path: Path) -> dict[str, Face | None]:
    """Read a table written by `write_table`: the face of each image, or None, by path."""
    table = read_manifest(path)
    boxes = table[_BOX].astype("Float64")
    return {
        # A box that the dataset gives has no score and no eyes.
        name: None if pd.isna(row["left"]) else Face(*row.to_numpy(float, na_value=math.nan))
        for name, (_, row) in zip(table["path"], boxes.iterrows(), strict=True)
    }


def missed_by_group(manifest: pd.DataFrame, faces: pd.DataFrame) -> dict:
    """Count the images, and those without a face, in each group of the metadata.

    Shows whether the detector misses one group more often than another.

    Args:
        manifest: manifest whose columns, other than `path` and `sha256`, define the groups.
        faces: return value of `find_all_faces`.
    """
    missed = manifest["path"].map(faces.set_index("path")["faces"]) == 0
    counts: dict[str, Mapping[str, dict[str, int]]] = {}
    for column in ["label", *manifest.columns.drop(COLUMNS)]:
        groups = missed.groupby(manifest[column].astype("string"))
        if 1 < groups.ngroups <= _MOST_GROUPS:
            counts[column] = {
                str(name): {"images": len(group), "no_face": int(group.sum())}
                for name, group in groups
            }
    return counts
