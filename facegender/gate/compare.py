"""Which results the gate compares: those in the work tree, and those of a commit."""

import io
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from ruamel.yaml import YAMLError

from facegender.data.manifest import read_manifest
from facegender.errors import UserError, reason_of
from facegender.evaluation.groups import NO_METADATA
from facegender.gate.freshness import edited_results, why_stale
from facegender.gate.judge import judge
from facegender.gate.pairing import Results, data_differences
from facegender.gate.rescoring import (
    Rescored,
    StoredModel,
    images_seen,
    model_of_commit,
    relabel,
    rescore,
)
from facegender.gate.stricter_rules import Rules, combine_rules
from facegender.gate.verdict import Report
from facegender.labels import NAMES
from facegender.params import Gate, Params
from facegender.runtime.dvc_context import pipeline_paths
from facegender.runtime.git import git, read_text, read_yaml, resolve, shallow_hint

MAIN = ("main", "origin/main")
# The files that the gate reads, by their names in dvc.yaml.
_RESULTS = ("test_metrics", "predictions", "export_metrics", "speed")


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
        revision: the baseline, or None for the default.
        accept_data_change: whether another test set is accepted.
        accept_rule_change: whether the work tree's rules apply even where they are looser than the
            baseline's.
        require_evidence: whether gate.without_evidence is `refuse`, whatever the rules say.

    Raises:
        UserError: the candidate's results are missing or unreadable.
    """
    candidate = read_results(root)
    baseline = None
    rules = Rules(params.gate, params.evaluate.min_group_size, params.evaluate.groups)
    stale = why_stale(root, _result_paths(root, None, candidate.name).values())
    undecided = list(stale)
    notes: list[str] = []
    try:
        why = ""
        if revision is None:
            revision, why = default_baseline(root, candidate)
        found = read_results(root, revision)
        undecided += _edited(root, revision, found.name)
        rules, notes = combine_rules(
            rules, read_params(root, revision), accept_change=accept_rule_change
        )
        baseline = replace(found, name=f"{why} ({revision[:10]})") if why else found
    except UserError as error:
        undecided.append(str(error))

    if require_evidence:
        rules = replace(rules, gate=rules.gate.model_copy(update={"without_evidence": "refuse"}))

    def judged(against: Results | None, gate: Gate, why: Sequence[str]) -> Report:
        return judge_on_the_same_images(
            candidate,
            against,
            gate,
            lambda: rescore_commit(root, candidate, against, gate.significance),
            min_group_size=rules.min_group_size,
            chosen=rules.groups,
            accept_data_change=accept_data_change,
            undecided=why,
        )

    report = judged(baseline, rules.gate, undecided)
    report = replace(report, notes=[*notes, *report.notes])
    return report if stale else add_reference(report, root, rules.gate, judged)


def judge_on_the_same_images(
    candidate: Results,
    baseline: Results | None,
    settings: Gate,
    rescored: Callable[[], Rescored],
    *,
    accept_data_change: bool = False,
    undecided: Sequence[str] = (),
    notes: Sequence[str] = (),
    **options: Any,
) -> Report:
    """Call `judge`, with the baseline's model scored again if the test sets differ.

    Args:
        baseline: results of the previous model, or None.
        rescored: function that scores the baseline's model on the candidate's images, or raises
            UserError.
        accept_data_change: whether the new test set is accepted; the comparison is then unpaired if
            the model cannot be scored.
        undecided: reasons why no comparison is possible.
        options: other arguments of `judge`.
    """
    compared = None
    undecided, notes = list(undecided), list(notes)
    if baseline and candidate.predictions is not None and data_differences(candidate, baseline):
        try:
            again = relabel(candidate, baseline, settings.significance) or rescored()
        except UserError as error:
            reason = (
                f"the model of {baseline.name} cannot be scored on the new test set: "
                f"{str(error).rstrip('.')}"
            )
            if accept_data_change:
                notes.append(reason)
            else:
                undecided.append(f"{reason}; --accept-data-change compares the two unpaired")
        else:
            candidate, compared, baseline = again.candidate, again.compared, again.baseline
            notes += again.notes
            if accept_data_change:
                notes += [f"accepted: {one}" for one in again.questions]
            else:
                undecided += [
                    f"{one}; --accept-data-change accepts the new test set"
                    for one in again.questions
                ]
    return judge(
        candidate,
        baseline,
        settings,
        compared=compared,
        accept_data_change=accept_data_change,
        undecided=undecided,
        notes=notes,
        **options,
    )


def rescore_commit(
    root: Path,
    candidate: Results,
    baseline: Results | None,
    significance: float,
    manifests: Collection[str] | None = None,
) -> Rescored:
    """Score the model of a baseline's commit. Raises what `rescore_work_tree` raises."""
    if baseline is None or baseline.commit is None:
        raise UserError("its commit is unknown")
    paths = paths_of(root, baseline.commit, baseline.name)
    stored = model_of_commit(root, baseline.commit, paths)
    return rescore_work_tree(root, candidate, baseline, stored, significance, manifests)


def rescore_work_tree(
    root: Path,
    candidate: Results,
    baseline: Results,
    stored: StoredModel,
    significance: float,
    manifests: Collection[str] | None = None,
) -> Rescored:
    """Score a stored model by `rescore` on raw images of the work tree.

    Args:
        manifests: beginnings of the SHA-256 of the manifests that the candidate was trained with;
            None if they are the work tree's.
    """
    paths = paths_of(root, None, candidate.name)
    seen, unknown = None, ""
    try:
        seen = images_seen(root, None, paths, manifests)
    except UserError as error:
        unknown = str(error)
    raw = root / paths["raw"]
    return rescore(candidate, baseline, stored, raw, significance, seen=seen, unknown=unknown)


def add_reference(
    report: Report,
    root: Path,
    settings: Gate,
    judged: Callable[[Results, Gate, Sequence[str]], Report],
) -> Report:
    """Return a report with the comparison with the fixed reference, if there is one.

    Args:
        report: verdict on the candidate against its baseline.
        settings: the rules that apply, with the reference.
        judged: function of results to compare with, rules, and reasons for no verdict.
    """
    reference = settings.reference
    if reference is None:
        return report
    try:
        fixed = read_results(root, reference)
        edited = _edited(root, reference, fixed.name)
        # The floors are judged already, and are the same.
        against = judged(fixed, settings.model_copy(update={"floors": {}}), edited)
    except UserError as error:
        return _undecided_by_reference(report, reference, [str(error)])
    if against.undecided:
        report = _undecided_by_reference(report, reference, against.undecided)
    return replace(report, reference=against if against.comparisons else None)


def _undecided_by_reference(report: Report, reference: str, reasons: Sequence[str]) -> Report:
    new = [reason.rstrip(".") for reason in reasons if reason not in report.undecided]
    sentences = [
        f"the candidate is not judged against gate.reference {reference}: {reason}. Fetch it (`git "
        "fetch --tags`), or set gate.reference to a commit with results on these test images; the "
        "gate accepts that with --accept-rule-change"
        for reason in new
    ]
    return replace(report, undecided=[*report.undecided, *sentences])


def commit_of(root: Path) -> str | None:
    """Return the commit of the repository, and whether there are uncommitted changes."""
    try:
        commit = git(root, "rev-parse", "--verify", "--quiet", "HEAD")
        changed = commit and git(root, "status", "--porcelain")
    except UserError:
        return None
    return f"{commit}, with uncommitted changes" if changed else commit or None


def read_results(root: Path, revision: str | None = None) -> Results:
    """Read the pipeline's metrics from the paths that dvc.yaml names.

    Args:
        revision: a commit, branch, tag or DVC experiment; None for the work tree.

    Raises:
        UserError: the revision does not exist, or its test metrics are missing or unreadable.
    """
    commit, name = None, "the work tree"
    if revision is not None:
        commit = resolve(root, revision)
        name = revision[:10] if commit.startswith(revision) else f"{revision} ({commit[:10]})"
    paths = _result_paths(root, commit, name)
    texts = {key: read_text(root, path, commit) for key, path in paths.items()}
    test_metrics = texts.pop("test_metrics", None)
    if test_metrics is None:
        advice = (
            "commit the results of `dvc repro` there, or choose another baseline"
            if revision
            else "run `dvc repro` first"
        )
        raise UserError(f"There are no test metrics in {name}: {advice}.")
    return replace(parse_results(name, test_metrics, **texts), commit=commit)


def _result_paths(root: Path, commit: str | None, name: str) -> dict[str, str]:
    """Return the path of each of _RESULTS that dvc.yaml of a commit or the work tree names."""
    paths = paths_of(root, commit, name)
    return {key: paths[key] for key in _RESULTS if key in paths}


def paths_of(root: Path, commit: str | None, name: str) -> dict[str, str]:
    """Return the paths of the pipeline's files in dvc.yaml of a commit or the work tree.

    Raises:
        UserError: dvc.yaml is not this project's.
    """
    try:
        return dict(pipeline_paths(read_text(root, "dvc.yaml", commit) or ""))
    except (YAMLError, LookupError, TypeError) as error:
        malformed = isinstance(error, YAMLError)
        reason = reason_of(error) if malformed else "it is missing, or has no `vars` with `path`"
        advice = (
            "choose another commit" if commit else "restore it with `git checkout HEAD dvc.yaml`"
        )
        raise UserError(
            f"Cannot read the paths in dvc.yaml of {name}: {reason}; {advice}."
        ) from error


def _edited(root: Path, revision: str, name: str) -> list[str]:
    """Return why a commit's results cannot be trusted; nothing if it has no dvc.lock."""
    commit = resolve(root, revision)
    if read_text(root, "dvc.lock", commit) is None:
        return []
    edited = edited_results(root, _result_paths(root, commit, name).values(), commit)
    advice = "choose another baseline, or commit the results of `dvc repro` there"
    return [f"{path} of {name} is not what its dvc.lock records: {advice}" for path in edited]


def parse_results(
    name: str,
    test_metrics: str,
    *,
    predictions: str | None = None,
    export_metrics: str | None = None,
    speed: str | None = None,
) -> Results:
    """Parse the files of evaluate, export and train. Raises UserError if one is malformed."""
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
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(
            f"Cannot read the results of {name}: {reason}. `dvc repro` there makes them again."
        ) from error
    return Results(name, metrics, table, costs)


def _parse_predictions(text: str) -> pd.DataFrame:
    table = read_manifest(io.StringIO(text))
    if missing := [name for name in NO_METADATA if name not in table.columns]:
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
    # The first epoch includes compiling, and the head's epochs, which come first, are many times
    # faster than those that train the base: the last three show what training costs.
    last = speed["images_per_second"].iloc[1:].tail(3)
    return {
        "training_images_per_second": float(last.median()),
        "training_seconds": float(speed["seconds"].sum()),
    }


def read_params(root: Path, revision: str) -> dict[str, Any]:
    """Return params.yaml at a revision, unchecked; empty if missing or not a mapping."""
    content = read_yaml(root, "params.yaml", resolve(root, revision))
    return content if isinstance(content, dict) else {}


def default_baseline(root: Path, candidate: Results) -> tuple[str, str]:
    """Return the commit to compare the work tree with, and a description of it.

    It is the merge base with main, local or fetched, whichever is nearer. On main itself, where the
    merge base is HEAD, it is HEAD if the candidate's predictions differ from the committed ones (an
    experiment), and otherwise the commit before it.

    Raises:
        UserError: there is no main, or nothing before the first commit.
    """
    base = merge_base(root)
    if not base:
        raise UserError(
            "Cannot find the merge base of HEAD and main. Fetch main with its history (`git fetch "
            f"origin main`), or name a commit: --baseline REV{shallow_hint(root)}."
        )
    head = git(root, "rev-parse", "HEAD")
    if base != head:
        return base, "the merge base with main"
    try:
        same = _same_predictions(candidate, read_results(root, head))
    except UserError:
        same = False
    if not same:
        return head, "HEAD"
    before = git(root, "rev-parse", "--verify", "--quiet", "HEAD~1")
    if not before and (shallow := shallow_hint(root)):
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


def merge_base(root: Path) -> str:
    """Return the merge base of HEAD and main, local or fetched; "" if there is none."""
    branches = [name for name in MAIN if git(root, "rev-parse", "--verify", "--quiet", name)]
    return git(root, "merge-base", "HEAD", *branches) if branches else ""


def _same_predictions(one: Results, other: Results) -> bool:
    columns = ["sha256", "label", "predicted", "probability"]
    if one.predictions is None or other.predictions is None:
        return one.metrics == other.metrics
    return one.predictions[columns].equals(other.predictions[columns])
