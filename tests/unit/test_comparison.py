import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from facegender.comparison import compare_with, head
from facegender.errors import UserError
from tests.compose import ROOT
from tests.results import pipeline_paths

PATHS = pipeline_paths()


def git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository on a branch, with a commit of results on main."""
    root = tmp_path / "repository"
    (root / ".dvc").mkdir(parents=True)
    shutil.copy(ROOT / ".dvc" / "config", root / ".dvc")
    shutil.copytree(ROOT / "metrics", root / "metrics")
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "results")
    git(root, "switch", "--quiet", "--create", "work")
    git(root, "commit", "--quiet", "--allow-empty", "--message", "work")
    return root


def change_predictions(root: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    path = root / PATHS["predictions"]
    table = pd.read_csv(path)
    change(table).to_csv(path, index=False)


def test_the_baseline_is_where_the_branch_left_main(root: Path) -> None:
    metrics = json.loads((root / PATHS["test_metrics"]).read_text())
    old = metrics["accuracy"], metrics["loss"]
    metrics |= {"accuracy": 0.5, "loss": 0.01}
    (root / PATHS["test_metrics"]).write_text(json.dumps(metrics))

    def flip(table: pd.DataFrame) -> pd.DataFrame:
        first = table.index[0]
        table.loc[first, ["probability", "predicted"]] = [0.75, 1 - table.loc[first, "predicted"]]
        return table

    change_predictions(root, flip)
    done = compare_with(root, None, PATHS)
    assert len(done.baseline) == 40
    changes = {change.name: change for change in done.changes}
    accuracy, loss = changes["Accuracy"], changes["Loss"]
    assert (accuracy.old, accuracy.new, accuracy.better) == (old[0], 0.5, False)
    assert accuracy.difference == 0.5 - old[0]
    assert (loss.old, loss.new, loss.better) == (old[1], 0.01, True)
    assert changes["Bytes, int8 export"].better is None
    assert done.caveat == ""
    (row,) = done.flips.to_dict("records")
    assert row["path"] == "female/0004.png"
    assert row["old_probability"] == pytest.approx(0.017368, abs=1e-6)
    assert (row["label"], row["new_probability"], row["right"]) == (0, 0.75, False)


def test_other_test_parts_are_not_compared_in_silence(root: Path) -> None:
    change_predictions(root, lambda table: table.iloc[1:])
    done = compare_with(root, "main", PATHS)
    assert done.baseline.startswith("main (")
    assert done.flips is None
    assert "360 images then, 359 now, 359 in both" in done.caveat
    (root / PATHS["predictions"]).unlink()
    assert "missing" in compare_with(root, "main", PATHS).caveat


def test_without_results_it_says_what_to_do(root: Path) -> None:
    git(root, "rm", "--quiet", "-r", "--cached", "metrics")
    git(root, "commit", "--quiet", "--message", "no results")
    with pytest.raises(UserError, match=r"HEAD has no metrics/test\.json"):
        compare_with(root, "HEAD", PATHS)
    with pytest.raises(UserError, match="no-such-branch"):
        compare_with(root, "no-such-branch", PATHS)
    (root / PATHS["test_metrics"]).unlink()
    with pytest.raises(UserError, match="the work tree has no"):
        compare_with(root, "main", PATHS)


def test_the_commit_is_told_with_what_differs_from_it(root: Path) -> None:
    commit = head(root)
    assert len(commit) == 40
    (root / "other").write_text("")
    assert head(root) == f"{commit}, with uncommitted changes"
