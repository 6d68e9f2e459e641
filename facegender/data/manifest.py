"""Manifests: tables of images with their labels, digests and metadata.

A manifest is a pandas DataFrame with the columns `path` (POSIX, relative to the raw data),
`label` (0 female, 1 male), `sha256` of the file, and one column for each attribute in the metadata
(age, country, ...).
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

COLUMNS = ["path", "label", "sha256"]
_TYPES: dict[str, Any] = {
    "path": str,
    "sha256": str,
    "label": "Int64",
    "row": "Int64",
    "predicted": "Int64",
    "probability": "Float64",
}
SPLITS = ("train", "validation", "test")


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV, with the same bytes on every platform."""
    table.to_csv(path, index=False, lineterminator="\n")


def read_manifest(source: Path | TextIO) -> pd.DataFrame:
    """Read a manifest or a table of predictions that `write_table` wrote.

    Metadata stay text, even NA and 007; only an empty cell is missing.
    """
    return pd.read_csv(
        source,
        dtype=defaultdict(lambda: "string", _TYPES),
        keep_default_na=False,
        na_values=[""],
        # Otherwise a carriage return in a name would end the row.
        lineterminator="\n",
    )
