"""The results of the work tree beside those of another commit, for `facegender report`."""

import io
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException

from facegender.errors import UserError
from facegender.report import METRICS, Change, Comparison

MAIN = ("main", "origin/main")


@dataclass(frozen=True)
class Results:
    """What is compared; exports and predictions may be missing."""

    metrics: Mapping[str, Any]
    export: Mapping[str, Any] | None
    predictions: pd.DataFrame | None


def compare_with(root: Path, baseline: str | None, paths: Mapping[str, str]) -> Comparison:
    """Compare the results in the work tree with those of a commit.

    Args:
        root: the repository.
        baseline: a commit, branch, tag or DVC experiment; None for the commit where HEAD left main,
            which is HEAD itself on main.
        paths: those of dvc.yaml, relative to the root.

    Raises:
        UserError: there is no such commit, or it has no results.
    """
    name = baseline or _merge_base(root)
    old, new = read_results(root, name, paths), read_results(root, None, paths)
    flips, caveat = _flips(old.predictions, new.predictions)
    commit = _git(root, "rev-parse", "--short", f"{name}^{{commit}}")
    return Comparison(
        baseline=name if commit.startswith(name[:7]) or not commit else f"{name} ({commit})",
        changes=_changes(old, new),
        flips=flips,
        caveat=caveat,
    )


def read_results(root: Path, revision: str | None, paths: Mapping[str, str]) -> Results:
    """Read results through DVC, from a revision or, without one, from the work tree.

    Raises:
        UserError: there is no such revision, or it has no results.
    """
    name = revision or "the work tree"
    try:
        files = DVCFileSystem(str(root), rev=revision)
        read = {
            key: files.read_text(paths[key]) if files.isfile(paths[key]) else None
            for key in ("test_metrics", "export_metrics", "predictions")
        }
    except DvcException as error:
        raise UserError(f"Cannot read the results of {name}: {error}") from error
    if read["test_metrics"] is None:
        raise UserError(
            f"{name} has no {paths['test_metrics']} to compare with: name a commit that has, with "
            "--baseline."
        )
    predictions = read["predictions"]
    return Results(
        metrics=json.loads(read["test_metrics"]),
        export=json.loads(read["export_metrics"]) if read["export_metrics"] else None,
        predictions=(
            pd.read_csv(io.StringIO(predictions), dtype={"path": str, "sha256": str})
            if predictions
            else None
        ),
    )


def head(root: Path) -> str | None:
    """Return the commit of the repository, and whether anything differs from it."""
    commit = _git(root, "rev-parse", "HEAD")
    if not commit:
        return None
    return f"{commit}, with uncommitted changes" if _git(root, "status", "--porcelain") else commit


def _merge_base(root: Path) -> str:
    for branch in MAIN:
        if base := _git(root, "merge-base", "HEAD", branch):
            return base
    return "HEAD"


def _changes(old: Results, new: Results) -> list[Change]:
    rows: list[tuple[str, float | None, float | None, bool | None]] = [
        ("Images", old.metrics.get("n"), new.metrics.get("n"), None)
    ]
    for name, (title, _, more_is_better) in METRICS.items():
        rows.append((title, old.metrics.get(name), new.metrics.get(name), more_is_better))
    for kind in ("float32", "int8"):
        one, two = ((results.export or {}).get(kind, {}) for results in (old, new))
        for key, title, more_is_better in (
            ("accuracy", f"Accuracy, {kind} export", True),
            ("size_bytes", f"Bytes, {kind} export", False),
        ):
            rows.append((title, one.get(key), two.get(key), more_is_better))
    return [
        Change(title, before, after, _better(before, after, more_is_better))
        for title, before, after, more_is_better in rows
    ]


def _better(old: float | None, new: float | None, more_is_better: bool | None) -> bool | None:
    if old is None or new is None or more_is_better is None or old == new:
        return None
    return (new > old) == more_is_better


def _flips(old: pd.DataFrame | None, new: pd.DataFrame | None) -> tuple[pd.DataFrame | None, str]:
    if old is None or new is None:
        return None, "The predictions are missing, so no image can be compared with itself."
    keys = ["path", "sha256", "label"]
    both = old[[*keys, "probability", "predicted"]].merge(
        new[[*keys, "probability", "predicted"]], on=keys, suffixes=("_old", "_new")
    )
    if len(both) != len(old) or len(both) != len(new):
        return None, (
            f"The test parts differ ({len(old)} images then, {len(new)} now, {len(both)} in both "
            "with the same label), so that a difference may be one of the data."
        )
    flipped = both[both["predicted_old"] != both["predicted_new"]]
    table = pd.DataFrame(
        {
            "path": flipped["path"],
            "label": flipped["label"],
            "old_probability": flipped["probability_old"],
            "new_probability": flipped["probability_new"],
            "right": flipped["predicted_new"] == flipped["label"],
        }
    )
    return table.reset_index(drop=True), ""


def _git(root: Path, *arguments: str) -> str:
    """Return what git prints, or nothing if it fails."""
    done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""
