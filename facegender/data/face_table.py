"""The table of faces beside the manifests: what was found in each image of the data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Unpack

import joblib
import pandas as pd
from tqdm import tqdm

from facegender.data.decode_rows import locate_faces
from facegender.data.engine import Where, run_tasks
from facegender.data.given_boxes import Box
from facegender.data.manifest import COLUMNS, read_manifest
from facegender.faces.detector import Face
from facegender.faces.settings import FaceCrop

_CHUNK = 16  # images a task
_MOST_GROUPS = 50  # a column of more values may name each image
_BOX = [field.name for field in fields(Face)]


def find_all_faces(
    manifest: pd.DataFrame,
    raw: Path,
    crop: FaceCrop,
    *,
    boxes: Mapping[str, Sequence[Box]] | None = None,
    **where: Unpack[Where],
) -> pd.DataFrame:
    """Look for faces in every image, on all cores.

    Args:
        manifest: columns `path` (relative to `raw`), `sha256` and any others.
        boxes: boxes of faces by path, to be taken if they are usable.
        where: arguments of `engine.run_tasks`.

    Returns:
        A row for each image: `path`, `faces` (how many) and the fields of the largest `Face`,
        which are missing if there are none. An image that cannot be decoded has no face. With
        `boxes` also `bad_box`: what is wrong with the image's box, if anything.
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
    """Return the face of each image by its path, or None, from a table that was written as CSV."""
    table = read_manifest(path)
    boxes = table[_BOX].astype("Float64")
    return {
        # A box of a table has no score and no eyes.
        name: None if pd.isna(row["left"]) else Face(*row.to_numpy(float, na_value=math.nan))
        for name, (_, row) in zip(table["path"], boxes.iterrows(), strict=True)
    }


def missed_by_group(manifest: pd.DataFrame, faces: pd.DataFrame) -> dict:
    """Return how many images, and how many without a face, each group of the metadata has.

    A detector that misses one group more often than another is a finding.

    Args:
        manifest: columns of a manifest; each one beyond `path` and `sha256` divides into groups.
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
