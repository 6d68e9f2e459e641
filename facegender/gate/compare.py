"""Results of a model, from the work tree or from a commit, and the commit to compare with."""

import io
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException

from facegender.errors import UserError
from facegender.gate.judge import PREDICTION_COLUMNS, Results, judge
from facegender.gate.verdict import Report
from facegender.labels import NAMES
from facegender.params import Gate, Params
from facegender.runtime.dvc_context import pipeline_paths

MAIN = ("main", "origin/main")


def judge_work_tree(
    root: Path, params: Params, revision: str | None, *, accept_data_change: bool
) -> Report:
    """Judge the results in the work tree beside those of a commit.

    Args:
        root: the repository.
        params: its parameters.
        revision: the baseline, or None for the default.
        accept_data_change: as in `gate.judge`.

    Raises:
        UserError: the candidate's results are missing or cannot be read.
    """
    candidate, baseline, undecided, notes = read_for_gate(root, revision, params.gate)
    return judge(
        candidate,
        baseline,
        params.gate,
        min_group_size=params.evaluate.min_group_size,
        accept_data_change=accept_data_change,
        undecided=undecided,
        notes=notes,
    )


def judge_folders(candidate: Path, champion: Path | None, params: Params) -> Report:
    """Judge results in a folder beside those in another.

    Args:
        candidate: with `test.json` and, if there are, `predictions.csv` and `export.json`.
        champion: the same of the model before, or None: only the floors are then judged.
        params: of the gate.

    Raises:
        UserError: a file is not what its stage writes.
    """
    return judge(
        _read_folder(candidate, "the run"),
        None if champion is None else _read_folder(champion, "the champion"),
        params.gate,
        min_group_size=params.evaluate.min_group_size,
        undecided=["there is no champion to compare with"] if champion is None else [],
    )


def _read_folder(folder: Path, name: str) -> Results:
    predictions, export = folder / "predictions.csv", folder / "export.json"
    return parse_results(
        name,
        test_metrics=(folder / "test.json").read_text(encoding="utf-8"),
        predictions=predictions.read_text(encoding="utf-8") if predictions.is_file() else None,
        export_metrics=export.read_text(encoding="utf-8") if export.is_file() else None,
        speed=None,
    )


def commit_of(root: Path) -> str | None:
    """Return the commit of the repository, and whether anything differs from it."""
    commit = _git(root, "rev-parse", "HEAD")
    if not commit:
        return None
    return f"{commit}, with uncommitted changes" if _git(root, "status", "--porcelain") else commit


def read_for_gate(
    root: Path, revision: str | None, settings: Gate
) -> tuple[Results, Results | None, list[str], list[str]]:
    """Read the two sides of a comparison.

    Args:
        root: the repository.
        revision: the baseline, or None for the default.
        settings: the gate's parameters in the work tree.

    Returns:
        The candidate, in the work tree; the baseline or None, and then why there is none; and
        warnings: what else a judge should know.

    Raises:
        UserError: the candidate's results are missing or cannot be read.
    """
    candidate = read_results(root)
    try:
        why = ""
        if revision is None:
            revision, why = default_baseline(root, candidate)
        baseline = read_results(root, revision)
        if why:
            baseline = replace(baseline, name=f"{why} ({revision[:10]})")
    except UserError as error:
        return candidate, None, [str(error)], []
    changes = _changes(_read_gate_params(root, revision), settings.model_dump())
    notes = [f"the gate's own parameters changed: {changes}"] if changes else []
    return candidate, baseline, [], notes


def read_results(root: Path, revision: str | None = None) -> Results:
    """Read what the pipeline left in its metrics, whose places dvc.yaml names.

    Args:
        root: the repository.
        revision: a commit, branch, tag or DVC experiment; None for the work tree.

    Raises:
        UserError: there is no such revision, it has no test metrics, or they cannot be read.
    """
    files, name = DVCFileSystem(str(root), rev=revision), "the work tree"
    if revision:
        try:
            name = _named(revision, files.repo.get_rev())
        except DvcException as error:
            raise UserError(
                f"Cannot read {revision}: {error}. If it is on the server, `git fetch` it first."
            ) from error
    try:
        # Paths from the root; without the slash they would be from the working directory.
        paths = pipeline_paths(files.read_text("/dvc.yaml"))
        texts = {
            key: files.read_text(f"/{path}") if files.isfile(f"/{path}") else None
            for key in ("test_metrics", "predictions", "export_metrics", "speed")
            for path in [paths.get(key)]
        }
    except (OSError, yaml.YAMLError, LookupError, TypeError, DvcException) as error:
        raise UserError(f"Cannot read the paths in dvc.yaml of {name}: {error}") from error
    if texts["test_metrics"] is None:
        advice = (
            "commit the results of `dvc repro` there, or choose another baseline"
            if revision
            else "run `dvc repro` first"
        )
        raise UserError(f"There are no test metrics in {name}: {advice}.")
    return parse_results(
        name,
        test_metrics=texts["test_metrics"],
        predictions=texts["predictions"],
        export_metrics=texts["export_metrics"],
        speed=texts["speed"],
    )


def _named(revision: str, commit: str) -> str:
    return revision[:10] if commit.startswith(revision) else f"{revision} ({commit[:10]})"


def parse_results(
    name: str,
    *,
    test_metrics: str,
    predictions: str | None,
    export_metrics: str | None,
    speed: str | None,
) -> Results:
    """Make results of the contents of the files that evaluate, export and train write.

    Raises:
        UserError: one of them is not what its stage writes.
    """
    costs: dict[str, float] = {}
    try:
        metrics = json.loads(test_metrics)
        if not isinstance(metrics, dict):
            raise ValueError("the test metrics are no JSON object")
        table = None if predictions is None else _parse_predictions(predictions)
        if export_metrics is not None:
            costs |= _export_costs(json.loads(export_metrics))
        if speed is not None:
            costs |= _training_costs(pd.read_csv(io.StringIO(speed)))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"Cannot read the results of {name}: {error}. Run `dvc repro` to make them anew."
        ) from error
    return Results(name, metrics, table, costs)


def _parse_predictions(text: str) -> pd.DataFrame:
    table = pd.read_csv(
        io.StringIO(text), dtype_backend="numpy_nullable", dtype={"path": str, "sha256": str}
    )
    if missing := [name for name in PREDICTION_COLUMNS if name not in table.columns]:
        raise ValueError(f"the predictions have no column {', '.join(missing)}")
    if not (len(table) and table[["label", "predicted"]].isin(list(NAMES)).all(axis=None)):
        raise ValueError(f"the predictions have labels other than {list(NAMES)}, or no row")
    if not table["probability"].between(0, 1).fillna(False).all():
        raise ValueError("the predictions have a probability that is no number from 0 to 1")
    return table


def _export_costs(metrics: dict[str, Any]) -> dict[str, float]:
    kinds = ("float32", "int8")
    return {f"size_{kind}_bytes": metrics[kind]["size_bytes"] for kind in kinds} | {
        f"latency_{kind}_ms": metrics[kind]["latency_ms"] for kind in kinds
    }


def _training_costs(speed: pd.DataFrame) -> dict[str, float]:
    # The first epoch also compiles.
    return {
        "training_images_per_second": float(speed["images_per_second"].iloc[1:].median()),
        "training_seconds": float(speed["seconds"].sum()),
    }


def _read_gate_params(root: Path, revision: str) -> dict[str, Any] | None:
    """Return the gate's parameters as a revision has them, or None if it has none."""
    try:
        content = yaml.safe_load(DVCFileSystem(str(root), rev=revision).read_text("/params.yaml"))
        return content.get("gate")
    except (OSError, yaml.YAMLError, AttributeError, DvcException):
        return None


def _changes(before: dict[str, Any] | None, after: dict[str, Any]) -> str:
    """Say which parameters differ, if there were any before."""
    if not isinstance(before, dict):
        return ""
    old, new = (pd.json_normalize(one).to_dict("records")[0] for one in (before, after))
    names = sorted(str(name) for name in {*old, *new} if old.get(name) != new.get(name))
    return ", ".join(f"{name} from {old.get(name)} to {new.get(name)}" for name in names)


def default_baseline(root: Path, candidate: Results) -> tuple[str, str]:
    """Return the commit that the work tree is to be compared with, and what it is.

    That is the merge base with main, the nearer one of the local and the fetched branch. On main
    itself, where the merge base is HEAD, it is HEAD if the candidate's predictions are not the
    ones committed there (an experiment), and else the commit before it.

    Raises:
        UserError: there is no main, or nothing before the first commit.
    """
    branches = [name for name in MAIN if _git(root, "rev-parse", "--verify", "--quiet", name)]
    base = branches and _git(root, "merge-base", "HEAD", *branches)
    if not base:
        raise UserError(
            "Cannot find the merge base of HEAD and main. Fetch main with its history (`git fetch "
            "origin main`, with --unshallow in a shallow clone), or name a commit: --baseline REV."
        )
    head = _git(root, "rev-parse", "HEAD")
    if base != head:
        return base, "the merge base with main"
    try:
        same = _same_predictions(candidate, read_results(root, head))
    except UserError:
        same = False
    if not same:
        return head, "HEAD"
    before = _git(root, "rev-parse", "--verify", "--quiet", "HEAD~1")
    if not before:
        raise UserError(
            "These are the results of HEAD, and no commit is before it: there is nothing to "
            "compare with. Name a commit or an experiment with --baseline REV."
        )
    return before, "the commit before HEAD"


def _same_predictions(one: Results, other: Results) -> bool:
    columns = ["sha256", "label", "predicted"]
    if one.predictions is None or other.predictions is None:
        return one.metrics == other.metrics
    return one.predictions[columns].equals(other.predictions[columns])


def _git(root: Path, *arguments: str) -> str:
    """Return what git prints, or nothing if it fails."""
    done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""
