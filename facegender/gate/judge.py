"""The gate's rules: may a model replace the one before it?

Floors concern the candidate alone; a drop is measured against a baseline on the same images.
docs/gate.md explains the verdict. This module reads no files.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import pandas as pd

from facegender.evaluation.groups import Chosen, holm
from facegender.evaluation.metrics import METRICS, shown_metrics
from facegender.gate.costs import compare_costs, finite
from facegender.gate.evidence import Evidence, images_for_noninferiority
from facegender.gate.floors import judge_floors
from facegender.gate.pairing import (
    Results,
    changed_predictions,
    data_differences,
    find_known_groups,
    pair,
    right_by_label,
)
from facegender.gate.significance import (
    Resampling,
    paired_difference,
    paired_ece_p,
    paired_f1_interval,
    unpaired_difference,
)
from facegender.gate.verdict import NO_FLIPS, Comparison, Report, Verdict
from facegender.labels import LABELS
from facegender.params import Gate

_EPSILON = 1e-9  # for rounding; below any difference between two shares of images
# Metrics are computed from float32, predictions are read from CSV.
_ROUNDING = 1e-6


def judge(
    candidate: Results,
    baseline: Results | None,
    settings: Gate,
    *,
    min_group_size: int,
    chosen: Chosen = None,
    compared: Results | None = None,
    accept_data_change: bool = False,
    undecided: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Report:
    """Judge a model by its floors and against a baseline.

    Args:
        settings: floors, tolerances, and number and seed of the random draws.
        min_group_size: images below which a group is shown but not judged.
        chosen: columns of the metadata that define groups, as in `find_groups`.
        compared: the candidate's results on the images to compare, if not on all.
        accept_data_change: whether to compare as two independent samples if the images cannot be
            paired: other images, other labels, or missing predictions.
        undecided: reasons why no comparison is possible.
        notes: warnings to include.

    Returns:
        The report. Its verdict is `cannot tell` without a comparable baseline.
    """
    current = compared or candidate
    differences = data_differences(current, baseline) if baseline else []
    pairs: pd.DataFrame | None = None
    changed: list[str] = []
    if baseline and not differences:
        pairs, changed = pair(current, baseline, chosen)
    predictions = candidate.predictions if pairs is None or compared else pairs
    if predictions is not None and pairs is not None:
        # Metadata that do not count in the comparison add no groups to the floors.
        predictions = predictions.filter(pairs.columns)
    floors = judge_floors(
        candidate.metrics,
        predictions,
        settings,
        min_group_size=min_group_size,
        chosen=chosen,
    )
    report = Report(candidate.name, baseline.name if baseline else None, floors, notes=notes)
    inconsistent = _inconsistencies(candidate, METRICS)
    if baseline is None:
        return replace(report, undecided=[*inconsistent, *undecided])
    # An older commit may have computed its other metrics otherwise.
    inconsistent += undecided
    inconsistent += _inconsistencies(baseline, ["accuracy"])
    old, new = right_by_label(baseline), right_by_label(candidate)
    if differences and (old is None or new is None):
        inconsistent.append(
            "the metrics have no confusion matrix: an unpaired comparison is impossible"
        )
    if inconsistent or (differences and not accept_data_change):
        return replace(report, undecided=[*inconsistent, *differences])
    flips, evidence = NO_FLIPS, None
    left_out: Sequence[str] = ()
    if pairs is not None:
        found = find_known_groups(pairs, chosen, min_group_size)
        left_out = found.left_out
        comparisons, groups = _paired(
            pairs, found.members, current, baseline, settings, min_group_size
        )
        flips = changed_predictions(pairs)
        evidence = _evidence(pairs, groups, settings)
        notes = [*notes, *changed]
    elif old is not None and new is not None:
        counts, left_out = _group_counts(candidate, baseline, chosen, min_group_size)
        comparisons, groups = _unpaired(
            old, new, counts, candidate, baseline, settings, min_group_size
        )
        notes = [*notes, *(f"accepted: {one}" for one in differences)]
    unproven: list[str] = []
    choice, fell = settings.without_evidence, comparisons[0].verdict == "warn"
    required = choice in ("warn", "refuse") or (choice == "refuse_drops" and fell)
    if required and not (evidence and evidence.enough):
        lacking = evidence.sentence if evidence else "an unpaired comparison has no known power"
        if choice == "warn":
            notes = [*notes, lacking]
        elif choice == "refuse":
            unproven.append(lacking)
        else:
            unproven.append(f"accuracy fell by more than the tolerance, and {lacking}")
    if settings.test == "noninferiority":
        unproven += _not_shown(comparisons, settings, pairs)
    return replace(
        report,
        unproven=unproven,
        evidence=evidence,
        paired=not differences,
        comparisons=comparisons,
        groups=groups,
        left_out=left_out,
        costs=compare_costs(candidate.costs, baseline.costs, settings),
        flips=flips,
        notes=notes,
    )


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


def _paired(
    pairs: pd.DataFrame,
    members_of_groups: Sequence[tuple[str, str, np.ndarray]],
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
        [compared(f"{column}={group}", members) for column, group, members in members_of_groups],
        settings,
        min_group_size=min_group_size,
    )
    before, after = (
        pairs[name].to_numpy(dtype=float) for name in ("old_probability", "probability")
    )
    rows = []
    for row in _informational(candidate, baseline):
        if row.metric == "f1":
            low, high = paired_f1_interval(labels, old, new)
            row = replace(row, low=low, high=high)
            row = _judge_other(row, settings.max_drop.f1, significant=not low <= 0 <= high)
        elif row.metric == "ece":
            row = replace(row, p=paired_ece_p(labels, before, after, resampling))
            significant = (row.p or 0.0) < settings.significance
            row = _judge_other(row, settings.max_drop.ece, significant=significant)
        rows.append(row)
    return [*comparisons, *rows], groups


def _evidence(pairs: pd.DataFrame, groups: Sequence[Comparison], settings: Gate) -> Evidence:
    """Return the evidence of the images if the models otherwise disagree as often as here."""
    was_right, is_right = (pairs["label"] == pairs[name] for name in ("old_predicted", "predicted"))
    gained = min((is_right & ~was_right).mean(), (was_right & ~is_right).mean())
    # The share of the accuracy among the questions of `_judge_drops`.
    level = settings.significance / (2 + any(not row.note for row in groups))
    return Evidence(len(pairs), float(gained), level, settings.max_drop.accuracy)


def _not_shown(
    comparisons: Sequence[Comparison], settings: Gate, pairs: pd.DataFrame | None
) -> list[str]:
    """Return a sentence for each share whose drop may exceed the tolerance, by its interval."""
    found = []
    for row in comparisons:
        tolerance = settings.max_drop.accuracy if row.metric == "accuracy" else None
        if row.metric.startswith("recall_"):
            tolerance = settings.max_drop.recall
        if tolerance is None or row.low is None or row.low > -tolerance:
            continue
        text = (
            f"it is not shown that {row.metric} drops by less than {tolerance:g}: its interval on "
            f"{row.n} images reaches {row.low:+.4f}"
        )
        if pairs is not None:
            label = LABELS.get(row.metric.removeprefix("recall_"))
            such = pairs if label is None else pairs[pairs["label"] == label]
            differing = float((such["predicted"] != such["old_predicted"]).mean())
            if needed := images_for_noninferiority(tolerance, differing):
                text += (
                    f"; of equally good models {needed:,} such images would show it (power 80 %)"
                )
        found.append(text)
    return found


def _unpaired(
    old: Mapping[str, tuple[int, int]],
    new: Mapping[str, tuple[int, int]],
    of_groups: Mapping[str, tuple[tuple[int, int], tuple[int, int]]],
    candidate: Results,
    baseline: Results,
    settings: Gate,
    min_group_size: int,
) -> tuple[list[Comparison], list[Comparison]]:
    """Compare two models on different images; a count is of right images, and of all."""

    def compared(metric: str, old: tuple[int, int], new: tuple[int, int]) -> Comparison:
        return Comparison(metric, new[1], **asdict(unpaired_difference(old, new)))

    def total(counts: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
        return sum(right for right, _ in counts.values()), sum(n for _, n in counts.values())

    comparisons, groups = _judge_drops(
        compared("accuracy", total(old), total(new)),
        [
            compared(f"recall_{name}", old[name], new[name])
            for name in LABELS
            if old[name][1] and new[name][1]
        ],
        [compared(name, *counts) for name, counts in of_groups.items()],
        settings,
        min_group_size=min_group_size,
    )
    return [*comparisons, *_informational(candidate, baseline)], groups


def _group_counts(
    candidate: Results, baseline: Results, chosen: Chosen, min_group_size: int
) -> tuple[dict[str, tuple[tuple[int, int], tuple[int, int]]], list[str]]:
    """Return the counts of groups in both test sets, baseline's first, and what is left out."""
    if candidate.predictions is None or baseline.predictions is None:
        return {}, ["groups: predictions are missing"]
    tables = (baseline.predictions, candidate.predictions)
    found = [find_known_groups(table, chosen, min_group_size) for table in tables]
    right = [(table["label"] == table["predicted"]).to_numpy() for table in tables]
    old, new = (
        {
            f"{column}={group}": (int(is_right[members].sum()), int(members.sum()))
            for column, group, members in groups.members
        }
        for is_right, groups in zip(right, found, strict=True)
    )
    left_out = []
    if lost := sorted(old.keys() ^ new.keys()):
        left_out.append(f"groups in one test set only: {', '.join(lost)}")
    left_out += [
        f"{sentence} ({one.name})"
        for one, groups in zip((baseline, candidate), found, strict=True)
        for sentence in groups.left_out
    ]
    return {name: (old[name], new[name]) for name in old if name in new}, left_out


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
    rows = []
    for row in groups:
        if row.n < min_group_size:
            note = f"fewer than {min_group_size} images: not judged"
            rows.append(replace(row, p=None, note=note))
            continue
        one = next(by_group)
        # Some of many groups drop by chance: warn only of drops significant on their own.
        chance = one.verdict == "warn" and (row.p or 0.0) >= settings.significance
        rows.append(replace(one, verdict="pass") if chance else one)
    return judged[: 1 + len(classes)], rows


def _judge_drop(row: Comparison, p: float, tolerance: float, significance: float) -> Comparison:
    # A single image is never a regression, however small the test set.
    allowed = max(tolerance, 1 / row.n) + _EPSILON
    beyond = row.difference is not None and -row.difference > allowed
    verdict: Verdict = "pass"
    if beyond:
        verdict = "fail" if p < significance else "warn"
    return replace(row, p=min(1.0, p), verdict=verdict)


def _informational(candidate: Results, baseline: Results) -> list[Comparison]:
    """Return the metrics whose drop never fails the gate: F1 follows from the recalls."""
    rows = []
    for metric in (one.name for one in shown_metrics() if one.in_gate):
        old, new = (finite(one.metrics.get(metric)) for one in (baseline, candidate))
        difference = new - old if old is not None and new is not None else None
        n = int(finite(candidate.metrics.get("n")) or 0)
        rows.append(Comparison(metric, n, old, new, difference))
    return rows


def _judge_other(row: Comparison, tolerance: float, *, significant: bool) -> Comparison:
    """Warn if a metric is worse by more than the tolerance, and significantly."""
    if row.difference is None:
        return row
    loss = -row.difference if METRICS[row.metric].higher_is_better else row.difference
    verdict: Verdict = "warn" if loss > tolerance + _EPSILON and significant else "pass"
    return replace(row, verdict=verdict)
