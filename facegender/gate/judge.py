"""The gate's rules: may a model replace the one before it?

Floors concern the candidate alone; a drop is measured against a baseline on the same images.
docs/gate.md explains the verdict. This module reads no files.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from facegender.evaluation.metrics import METRICS, group_names, shown_metrics
from facegender.gate.costs import compare_costs, finite
from facegender.gate.evidence import Evidence
from facegender.gate.significance import (
    Resampling,
    holm,
    paired_difference,
    paired_ece_interval,
    paired_f1_interval,
    unpaired_difference,
)
from facegender.gate.verdict import NO_FLIPS, Comparison, Floor, Report, Verdict
from facegender.labels import LABELS, NAMES
from facegender.params import AtLeast, AtMost, Gate

# Columns of predictions that are not metadata, and those that `pair` adds.
PREDICTION_COLUMNS = ("path", "label", "probability", "predicted", "sha256")
_NO_METADATA = [*PREDICTION_COLUMNS, "old_probability", "old_predicted"]

_EPSILON = 1e-9  # for rounding; below any difference between two shares of images
# Metrics are computed from float32, predictions are read from CSV.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Results:
    """The results of one evaluation.

    Attributes:
        name: name in the report.
        metrics: result of `classification_metrics`.
        predictions: one row per test image: PREDICTION_COLUMNS and metadata columns; None if
            missing.
        costs: `size_*_bytes`, `latency_*_ms`, `training_images_per_second` and
            `training_seconds`, as far as recorded.
    """

    name: str
    metrics: Mapping[str, Any]
    predictions: pd.DataFrame | None
    costs: Mapping[str, float]


def judge(
    candidate: Results,
    baseline: Results | None,
    settings: Gate,
    *,
    min_group_size: int,
    accept_data_change: bool = False,
    require_evidence: bool = False,
    undecided: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Report:
    """Judge a model by its floors and against a baseline.

    Args:
        candidate: results to judge.
        baseline: results of the model before, or None.
        settings: floors, tolerances, and seed of the intervals.
        min_group_size: images below which a group is shown but not judged.
        accept_data_change: whether to compare as two independent samples if the images cannot be
            paired: other images, other labels, or missing predictions.
        require_evidence: whether there is no verdict if the test set cannot show a drop of the
            tolerance.
        undecided: reasons why no comparison is possible.
        notes: warnings to include.

    Returns:
        The report. Its verdict is `cannot tell` without a comparable baseline.
    """
    floors = judge_floors(candidate.metrics, settings.floors)
    inconsistent = _inconsistencies(candidate, METRICS)
    if baseline is None:
        return Report(
            candidate=candidate.name,
            baseline=None,
            floors=floors,
            undecided=[*inconsistent, *undecided],
            notes=notes,
        )
    # An older commit may have computed its other metrics otherwise.
    inconsistent += undecided
    inconsistent += _inconsistencies(baseline, ["accuracy"])
    differences = data_differences(candidate, baseline)
    old, new = _right_by_label(baseline), _right_by_label(candidate)
    if differences and (old is None or new is None):
        inconsistent.append(
            "the metrics have no confusion matrix: an unpaired comparison is impossible"
        )
    if inconsistent or (differences and not accept_data_change):
        return Report(
            candidate=candidate.name,
            baseline=baseline.name,
            floors=floors,
            undecided=[*inconsistent, *differences],
            notes=notes,
        )
    flips, evidence = NO_FLIPS, None
    if not differences:
        pairs = pair(candidate, baseline)
        comparisons, groups = _paired(pairs, candidate, baseline, settings, min_group_size)
        flips = _flips(pairs)
        evidence = _evidence(pairs, groups, settings)
        notes = [*notes, *_lost_columns(candidate, baseline)]
    elif old is not None and new is not None:
        comparisons, groups = _unpaired(old, new, candidate, baseline, settings, min_group_size)
        notes = [*notes, *(f"accepted: {one}" for one in differences)]
    lacking = []
    if require_evidence and not (evidence and evidence.enough):
        lacking = [evidence.sentence if evidence else "an unpaired comparison has no known power"]
    return Report(
        candidate=candidate.name,
        baseline=baseline.name,
        floors=floors,
        undecided=lacking,
        evidence=evidence,
        paired=not differences,
        comparisons=comparisons,
        groups=groups,
        costs=compare_costs(candidate.costs, baseline.costs, settings),
        flips=flips,
        notes=notes,
    )


def judge_floors(metrics: Mapping[str, Any], floors: Mapping[str, AtLeast | AtMost]) -> list[Floor]:
    """Compare metrics with their floors; a value that is missing or not finite fails."""
    rows = []
    for name, floor in floors.items():
        value = finite(metrics.get(name))
        if isinstance(floor, AtLeast):
            limit, reached = floor.at_least, value is not None and value >= floor.at_least
        else:
            limit, reached = floor.at_most, value is not None and value <= floor.at_most
        rows.append(
            Floor(
                metric=name,
                value=value,
                direction="at least" if isinstance(floor, AtLeast) else "at most",
                limit=limit,
                verdict="pass" if reached else "fail",
            )
        )
    return rows


def _inconsistencies(results: Results, metrics: Collection[str]) -> list[str]:
    """Return why no verdict is possible if metrics and predictions come from two evaluations."""
    predictions = results.predictions
    if predictions is None:
        return []
    labels, predicted = (predictions[name].to_numpy(dtype=int) for name in ("label", "predicted"))
    probabilities = predictions["probability"].to_numpy(dtype=float)
    n = results.metrics.get("n")
    for name in metrics:
        recorded = finite(results.metrics.get(name))
        if recorded is None:  # floors refuse it
            continue
        computed = METRICS[name].compute(labels, probabilities, predicted)
        if n != len(labels) or computed is None or abs(recorded - computed) > _ROUNDING:
            now = "nothing" if computed is None else f"{computed:.4f}"
            return [
                f"the metrics of {results.name} report {name} {recorded:.4f} on {n} images, its "
                f"predictions {now} on {len(labels)}: they come from different evaluations; run "
                "`dvc repro`"
            ]
    return []


def data_differences(candidate: Results, baseline: Results) -> list[str]:
    """Return what prevents an image-by-image comparison."""
    if missing := [one.name for one in (candidate, baseline) if one.predictions is None]:
        return [f"there are no predictions of {' and '.join(missing)}"]
    new, old = _keyed(candidate.predictions), _keyed(baseline.predictions)
    shared = new.index.intersection(old.index)
    found = []
    if not len(new) == len(old) == len(shared):
        found.append(
            f"the test sets differ: {len(new)} images in {candidate.name}, {len(old)} in "
            f"{baseline.name}, {len(shared)} in both"
        )
    relabelled = int((new.loc[shared, "label"] != old.loc[shared, "label"]).sum())
    if relabelled and relabelled == len(shared):
        found.append("the label mapping differs: each image in both has the other label")
    elif relabelled:
        found.append(f"the labels differ: {relabelled} of {len(shared)} images have the other one")
    return found


def _keyed(predictions: pd.DataFrame | None) -> pd.DataFrame:
    """Index predictions by the image's digest and its number among identical images."""
    if predictions is None:
        raise ValueError("no predictions")
    ordered = predictions.sort_values(["sha256", "path"])
    copy = ordered.groupby("sha256").cumcount()
    return ordered.set_index([ordered["sha256"].astype(str), copy])


def pair(candidate: Results, baseline: Results) -> pd.DataFrame:
    """Return the candidate's predictions joined with the baseline's.

    Returns:
        The candidate's columns, `old_probability` and `old_predicted`, sorted by path.
    """
    new, old = _keyed(candidate.predictions), _keyed(baseline.predictions)
    pairs = new.assign(old_probability=old["probability"], old_predicted=old["predicted"])
    return pairs.sort_values("path").reset_index(drop=True)


def _paired(
    pairs: pd.DataFrame,
    candidate: Results,
    baseline: Results,
    settings: Gate,
    min_group_size: int,
) -> tuple[list[Comparison], list[Comparison]]:
    """Compare two models on the same images: overall and by class, and by group."""
    resampling = Resampling(settings.bootstrap_samples, settings.seed)
    labels, old, new = (
        pairs[name].to_numpy(dtype=int) for name in ("label", "old_predicted", "predicted")
    )
    was_right, is_right = old == labels, new == labels

    def compared(metric: str, members: np.ndarray) -> Comparison:
        difference = paired_difference(was_right[members], is_right[members])
        return Comparison(metric, int(members.sum()), **asdict(difference))

    comparisons, groups = _judge_drops(
        compared("accuracy", np.ones(len(labels), dtype=bool)),
        [
            compared(f"recall_{name}", labels == value)
            for name, value in LABELS.items()
            if (labels == value).any()
        ],
        [compared(f"{column}={group}", members) for column, group, members in _groups(pairs)],
        settings,
        min_group_size=min_group_size,
    )
    before, after = (
        pairs[name].to_numpy(dtype=float) for name in ("old_probability", "probability")
    )
    intervals = {
        "f1": paired_f1_interval(labels, old, new, resampling),
        "ece": paired_ece_interval(labels, before, after, resampling),
    }
    return [
        *comparisons,
        *(
            _judge_interval(row, intervals[row.metric], getattr(settings.max_drop, row.metric))
            if row.metric in intervals
            else row
            for row in _informational(candidate, baseline)
        ),
    ], groups


def _evidence(pairs: pd.DataFrame, groups: Sequence[Comparison], settings: Gate) -> Evidence:
    """Return what the images can show if the models disagree otherwise as often as here."""
    was_right, is_right = (pairs["label"] == pairs[name] for name in ("old_predicted", "predicted"))
    gained = min((is_right & ~was_right).mean(), (was_right & ~is_right).mean())
    # The share of the accuracy among the questions of `_judge_drops`.
    level = settings.significance / (2 + any(not row.note for row in groups))
    return Evidence(len(pairs), float(gained), level, settings.max_drop.accuracy)


def _unpaired(
    old: Mapping[str, tuple[int, int]],
    new: Mapping[str, tuple[int, int]],
    candidate: Results,
    baseline: Results,
    settings: Gate,
    min_group_size: int,
) -> tuple[list[Comparison], list[Comparison]]:
    """Compare two models on different images; `old` and `new` come from `_right_by_label`."""

    def compared(metric: str, old: tuple[int, int], new: tuple[int, int]) -> Comparison:
        return Comparison(metric, new[1], **asdict(unpaired_difference(old, new)))

    def total(counts: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
        return sum(right for right, _ in counts.values()), sum(n for _, n in counts.values())

    groups = []
    if candidate.predictions is not None and baseline.predictions is not None:
        before = {
            (column, group): _right(baseline.predictions[members])
            for column, group, members in _groups(baseline.predictions)
        }
        groups = [
            compared(
                f"{column}={group}", before[column, group], _right(candidate.predictions[members])
            )
            for column, group, members in _groups(candidate.predictions)
            if (column, group) in before
        ]
    comparisons, groups = _judge_drops(
        compared("accuracy", total(old), total(new)),
        [
            compared(f"recall_{name}", old[name], new[name])
            for name in LABELS
            if old[name][1] and new[name][1]
        ],
        groups,
        settings,
        min_group_size=min_group_size,
    )
    return [*comparisons, *_informational(candidate, baseline)], groups


def _groups(predictions: pd.DataFrame) -> list[tuple[str, str, np.ndarray]]:
    """Return column, name and members, bool (n,), of each group smaller than the split."""
    found = []
    for column in predictions.columns.drop(_NO_METADATA, errors="ignore"):
        codes, names = pd.factorize(group_names(predictions[column]), sort=True)
        for code, group in enumerate(names):
            members = codes == code
            if not members.all():
                found.append((str(column), str(group), members))
    return found


def _right(predictions: pd.DataFrame) -> tuple[int, int]:
    return int((predictions["label"] == predictions["predicted"]).sum()), len(predictions)


def _right_by_label(results: Results) -> dict[str, tuple[int, int]] | None:
    """Return the number of correct predictions and of images for each label."""
    try:
        confusion = results.metrics["confusion"]
        return {
            name: (
                int(confusion[f"{name}_as_{name}"]),
                sum(int(confusion[f"{name}_as_{guess}"]) for guess in LABELS),
            )
            for name in LABELS
        }
    except (LookupError, TypeError, ValueError):
        return None


def _judge_drops(
    overall: Comparison,
    classes: Sequence[Comparison],
    groups: Sequence[Comparison],
    settings: Gate,
    *,
    min_group_size: int,
) -> tuple[list[Comparison], list[Comparison]]:
    """Adjust the p-values for the number of tests, and set the verdicts.

    The questions (all images, classes, groups) share the significance level equally (Bonferroni);
    within each, Holm's method controls it over all rows. Otherwise one group in forty would fail
    by chance.

    Returns:
        Comparisons overall and by class, and by group.
    """
    large = [row for row in groups if row.n >= min_group_size]
    tolerances = settings.max_drop
    questions = [([overall], tolerances.accuracy), (classes, tolerances.recall)]
    if large:
        questions.append((large, tolerances.group))
    judged = [
        _judge_drop(row, len(questions) * p, tolerance, settings.significance)
        for rows, tolerance in questions
        for row, p in zip(rows, holm([row.p or 0.0 for row in rows]), strict=True)
    ]
    by_group = iter(judged[1 + len(classes) :])
    small = f"fewer than {min_group_size} images: not judged"
    return judged[: 1 + len(classes)], [
        # Some of many groups drop by chance: warn only of drops significant on their own.
        _drop_chance_warnings(next(by_group), row.p or 0.0, settings.significance)
        if row.n >= min_group_size
        else replace(row, p=None, note=small)
        for row in groups
    ]


def _judge_drop(row: Comparison, p: float, tolerance: float, significance: float) -> Comparison:
    # A single image is never a regression, however small the test set.
    allowed = max(tolerance, 1 / row.n) + _EPSILON
    beyond = row.difference is not None and -row.difference > allowed
    verdict: Verdict = "pass"
    if beyond:
        verdict = "fail" if p < significance else "warn"
    return replace(row, p=min(1.0, p), verdict=verdict)


def _drop_chance_warnings(row: Comparison, unadjusted: float, significance: float) -> Comparison:
    chance = row.verdict == "warn" and unadjusted >= significance
    return replace(row, verdict="pass") if chance else row


def _informational(candidate: Results, baseline: Results) -> list[Comparison]:
    """Return the metrics whose drop never fails the gate: F1 follows from the recalls."""
    rows = []
    for metric in (one.name for one in shown_metrics() if one.in_gate):
        old, new = (finite(one.metrics.get(metric)) for one in (baseline, candidate))
        difference = new - old if old is not None and new is not None else None
        n = int(finite(candidate.metrics.get("n")) or 0)
        rows.append(Comparison(metric, n, old, new, difference))
    return rows


def _judge_interval(row: Comparison, interval: tuple[float, float], tolerance: float) -> Comparison:
    """Warn if a metric is worse by more than the tolerance and its interval excludes 0."""
    if row.difference is None:
        return row
    low, high = interval
    if METRICS[row.metric].higher_is_better:
        beyond, excluded = -row.difference > tolerance + _EPSILON, high < 0
    else:
        beyond, excluded = row.difference > tolerance + _EPSILON, low > 0
    verdict: Verdict = "warn" if beyond and excluded else "pass"
    return replace(row, low=low, high=high, verdict=verdict)


def _flips(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the images whose prediction changed, newly wrong ones first."""
    flipped = pairs[pairs["predicted"] != pairs["old_predicted"]]
    columns = ["path", "label", "old_probability", "new_probability", "right"]
    return (
        flipped.assign(
            label=flipped["label"].map(NAMES),
            new_probability=flipped["probability"],
            right=flipped["predicted"] == flipped["label"],
        )[columns]
        .sort_values(["right", "path"])
        .reset_index(drop=True)
    )


def _lost_columns(candidate: Results, baseline: Results) -> list[str]:
    if candidate.predictions is None or baseline.predictions is None:
        return []
    lost = baseline.predictions.columns.difference(candidate.predictions.columns, sort=False)
    note = f"the metadata no longer has {', '.join(lost)}: its groups are not judged"
    return [note] if len(lost) else []
