"""Which results the gate compares: those in the work tree, and those of a commit."""

import io
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from facegender.data.manifest import read_manifest
from facegender.errors import UserError
from facegender.gate.judge import PREDICTION_COLUMNS, Results, judge
from facegender.gate.rules import Rules, combine_rules
from facegender.gate.verdict import Report
from facegender.labels import NAMES
from facegender.params import Params
from facegender.runtime.dvc_context import pipeline_paths

MAIN = ("main", "origin/main")
NO_CHAMPION = "there is no champion to compare with"
# A partial clone fetches a baseline's files from its server.
_GIT_SECONDS = 120


def judge_work_tree(
    root: Path,
    params: Params,
    revision: str | None,
    *,
    accept_data_change: bool,
    accept_rule_change: bool = False,
    require_evidence: bool = False,
) -> Report:
    """Judge the results in the work tree against those of a commit.

    Args:
        root: the repository.
        params: parameters in the work tree.
        revision: the baseline, or None for the default.
        accept_data_change: argument of `judge`.
        accept_rule_change: whether the work tree's rules apply even where they are looser than the
            baseline's.
        require_evidence: argument of `judge`.

    Raises:
        UserError: the candidate's results are missing or unreadable.
    """
    candidate = read_results(root)
    rules, baseline = Rules(params.gate, params.evaluate.min_group_size), None
    undecided: list[str] = []
    notes: list[str] = []
    try:
        why = ""
        if revision is None:
            revision, why = default_baseline(root, candidate)
        found = read_results(root, revision)
        rules, notes = combine_rules(
            rules, _read_params(root, revision), accept_change=accept_rule_change
        )
        baseline = replace(found, name=f"{why} ({revision[:10]})") if why else found
    except UserError as error:
        undecided = [str(error)]
    return judge(
        candidate,
        baseline,
        rules.gate,
        min_group_size=rules.min_group_size,
        accept_data_change=accept_data_change,
        require_evidence=require_evidence,
        undecided=undecided,
        notes=notes,
    )


def judge_folders(candidate: Path, champion: Path | None, params: Params) -> Report:
    """Judge results in a folder against those in another.

    Args:
        candidate: folder with `test.json` and, optionally, `predictions.csv` and `export.json`.
        champion: the same for the model before; None if the floors alone count.
        params: parameters of the gate.

    Raises:
        UserError: a file is not what its stage writes.
    """
    return judge(
        _read_folder(candidate, "the run"),
        None if champion is None else _read_folder(champion, "the champion"),
        params.gate,
        min_group_size=params.evaluate.min_group_size,
        undecided=[NO_CHAMPION] if champion is None else [],
    )


def may_be_champion(report: Report) -> bool:
    """Return whether a report of `judge_folders` allows promotion.

    The first champion has no other to be compared with; nothing else that is undecided is excused.
    """
    alone = list(report.undecided) == [NO_CHAMPION] and not report.failures
    return alone or report.exit_code == 0


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
    """Return the commit of the repository, and whether there are uncommitted changes."""
    try:
        commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
        changed = commit and _git(root, "status", "--porcelain")
    except UserError:
        return None
    return f"{commit}, with uncommitted changes" if changed else commit or None


def read_results(root: Path, revision: str | None = None) -> Results:
    """Read the pipeline's metrics from the paths that dvc.yaml names.

    Args:
        root: the repository.
        revision: a commit, branch, tag or DVC experiment; None for the work tree.

    Raises:
        UserError: the revision does not exist, or its test metrics are missing or unreadable.
    """
    commit, name = None, "the work tree"
    if revision is not None:
        commit = _resolve(root, revision)
        name = revision[:10] if commit.startswith(revision) else f"{revision} ({commit[:10]})"
    try:
        paths = pipeline_paths(_read(root, "dvc.yaml", commit) or "")
    except (yaml.YAMLError, LookupError, TypeError) as error:
        raise UserError(f"Cannot read the paths in dvc.yaml of {name}: {error}") from error
    texts = {
        key: _read(root, paths[key], commit) if key in paths else None
        for key in ("test_metrics", "predictions", "export_metrics", "speed")
    }
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


def _read(root: Path, path: str, commit: str | None) -> str | None:
    """Return the text of a file of a commit or, without one, of the work tree; None if missing.

    By git itself: its libraries cannot fetch what a partial clone lacks.
    """
    try:
        if commit is None:
            file = root / path
            return file.read_text(encoding="utf-8") if file.is_file() else None
        entry = _git(root, "ls-tree", commit, "--", path)
        return _git(root, "cat-file", "blob", entry.split()[2], strip=False) if entry else None
    except (OSError, UnicodeError) as error:
        where = f"{commit[:10]}" if commit else "the work tree"
        raise UserError(f"Cannot read {path} of {where}: {error}") from error


def _resolve(root: Path, revision: str) -> str:
    """Return the commit of a branch, tag, commit or DVC experiment.

    Raises:
        UserError: it does not exist, or several experiments have the name.
    """
    commit = _git(
        root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"
    )
    if commit:
        return commit
    listed = _git(root, "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps")
    experiments = [line.split(" ", 1) for line in listed.splitlines()]
    found = {commit for commit, name in experiments if name.rpartition("/")[2] == revision}
    if len(found) > 1:
        raise UserError(
            f"Several experiments are called '{revision}': name its commit, as in `dvc exp show`."
        )
    if not found:
        raise UserError(
            f"Cannot read {revision}: unknown Git revision '{revision}'. If it is on the server, "
            f"`git fetch` it first{_if_shallow(root)}."
        )
    return found.pop()


def _if_shallow(root: Path) -> str:
    shallow = _git(root, "rev-parse", "--is-shallow-repository") == "true"
    note = "; this clone is shallow: `git fetch --unshallow` gets the commits that it lacks"
    return note if shallow else ""


def parse_results(
    name: str,
    *,
    test_metrics: str,
    predictions: str | None,
    export_metrics: str | None,
    speed: str | None,
) -> Results:
    """Parse the contents of the files that evaluate, export and train write.

    Raises:
        UserError: a file is not what its stage writes.
    """
    costs: dict[str, float] = {}
    try:
        metrics = json.loads(test_metrics)
        if not isinstance(metrics, dict):
            raise ValueError("the test metrics are not a JSON object")
        table = None if predictions is None else _parse_predictions(predictions)
        if export_metrics is not None:
            costs |= _export_costs(json.loads(export_metrics))
        if speed is not None:
            costs |= _training_costs(pd.read_csv(io.StringIO(speed)))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"Cannot read the results of {name}: {error}. Run `dvc repro` to make them again."
        ) from error
    return Results(name, metrics, table, costs)


def _parse_predictions(text: str) -> pd.DataFrame:
    table = read_manifest(io.StringIO(text))
    if missing := [name for name in PREDICTION_COLUMNS if name not in table.columns]:
        raise ValueError(f"the predictions have no column {', '.join(missing)}")
    if not (len(table) and table[["label", "predicted"]].isin(list(NAMES)).all(axis=None)):
        raise ValueError(f"the predictions have labels other than {list(NAMES)}, or no row")
    if not table["probability"].between(0, 1).fillna(False).all():
        raise ValueError("the predictions have a probability that is not a number from 0 to 1")
    return table


def _export_costs(metrics: dict[str, Any]) -> dict[str, float]:
    kinds = ("float32", "int8")
    return {f"size_{kind}_bytes": metrics[kind]["size_bytes"] for kind in kinds} | {
        f"latency_{kind}_ms": metrics[kind]["latency_ms"] for kind in kinds
    }


def _training_costs(speed: pd.DataFrame) -> dict[str, float]:
    # The first epoch includes compiling.
    return {
        "training_images_per_second": float(speed["images_per_second"].iloc[1:].median()),
        "training_seconds": float(speed["seconds"].sum()),
    }


def _read_params(root: Path, revision: str) -> dict[str, Any]:
    """Return params.yaml at a revision, unchecked; empty if missing or not a mapping."""
    text = _read(root, "params.yaml", _resolve(root, revision))
    try:
        content = yaml.safe_load(text or "")
    except yaml.YAMLError as error:
        raise UserError(f"Cannot read params.yaml of {revision[:10]}: {error}") from error
    return content if isinstance(content, dict) else {}


def default_baseline(root: Path, candidate: Results) -> tuple[str, str]:
    """Return the commit to compare the work tree with, and a description of it.

    It is the merge base with main: of the local and the fetched branch, the nearer one. On main
    itself, where the merge base is HEAD, it is HEAD if the candidate's predictions differ from the
    committed ones (an experiment), and otherwise the commit before it.

    Raises:
        UserError: there is no main, or nothing before the first commit.
    """
    branches = [name for name in MAIN if _git(root, "rev-parse", "--verify", "--quiet", name)]
    base = branches and _git(root, "merge-base", "HEAD", *branches)
    if not base:
        raise UserError(
            "Cannot find the merge base of HEAD and main. Fetch main with its history (`git fetch "
            f"origin main`), or name a commit: --baseline REV{_if_shallow(root)}."
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
    if not before and (shallow := _if_shallow(root)):
        raise UserError(
            "These are the results of HEAD, and the commit before it is not in this clone"
            f"{shallow}. Or name another commit with --baseline REV."
        )
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


def _git(root: Path, *arguments: str, strip: bool = True) -> str:
    """Return what git prints; nothing if it exits with 1 in silence, as queries do.

    Raises:
        UserError: git failed, in its own words, or took too long.
    """
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=root,
            capture_output=True,
            encoding="utf-8",
            check=False,
            stdin=subprocess.DEVNULL,
            # Without a terminal neither git nor ssh can wait for a password.
            start_new_session=True,
            env=os.environ | {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"},
            timeout=_GIT_SECONDS,
        )
    except OSError as error:
        raise UserError(f"Cannot run git: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"git {arguments[0]} took more than {_GIT_SECONDS} seconds.") from error
    if done.returncode == 0:
        return done.stdout.strip() if strip else done.stdout
    if done.returncode == 1 and not done.stderr:
        return ""
    words = " ".join(done.stderr.split())
    raise UserError(f"git {arguments[0]} failed: {words or f'exit code {done.returncode}'}")
