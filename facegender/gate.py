"""The gate: is a model fit to take the place of the one before it?

Floors are judged on the candidate alone. Drops are judged against a baseline, paired by test
image: exactly (McNemar, Note on the sampling error of the difference between correlated
proportions or percentages, Psychometrika 12, 1947) and with bootstrap intervals of the difference
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993). docs/gate.md says how a verdict is
reached. Nothing here reads a file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import binomtest, fisher_exact

from facegender.evaluation import expected_calibration_error, group_names
from facegender.labels import LABELS, NAMES
from facegender.params import AtLeast, Gate

Verdict = Literal["pass", "warn", "fail", "info"]

# Columns of predictions that are no metadata.
PREDICTION_COLUMNS = ("path", "label", "probability", "predicted", "sha256")

# Fractions of images do not add up exactly; no two of them are as near as this.
_EPSILON = 1e-9


@dataclass(frozen=True)
class Results:
    """What one evaluation of a model left.

    Attributes:
        name: how to call it.
        metrics: the test metrics of `evaluation.classification_metrics`.
        predictions: a row a test image: PREDICTION_COLUMNS and columns of metadata; None if there
            are none.
        costs: `size_*` in bytes, `latency_*` in ms, `training_images_per_second` and
            `training_seconds`, as far as they are known.
    """

    name: str
    metrics: Mapping[str, Any]
    predictions: pd.DataFrame | None
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Floor:
    """A metric of the candidate beside what it must reach; `value` is None if it is missing."""

    metric: str
    value: float | None
    direction: Literal["at least", "at most"]
    limit: float
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """A metric of the candidate beside the baseline's.

    Attributes:
        metric: its name, or `column=group`.
        n: images it is computed from, in the candidate.
        old: the baseline's value.
        new: the candidate's.
        difference: new less old.
        low: lower end of the difference's 95 % interval.
        high: upper end.
        p: chance of a difference at least as large if neither were better, adjusted for all that is
            tested; None if it is not tested.
        verdict: info if it does not enter the verdict.
        note: what limits the figure, or nothing.
    """

    metric: str
    n: int
    old: float | None
    new: float | None
    difference: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    verdict: Verdict = "info"
    note: str = ""


@dataclass(frozen=True)
class CostRatio:
    """A cost of the candidate as a ratio to the baseline's; None where it is not recorded."""

    metric: str
    old: float | None
    new: float | None
    ratio: float | None
    limit: float
    verdict: Verdict


@dataclass(frozen=True)
class Report:
    """All that the gate found.

    Attributes:
        candidate: name of the results that are judged.
        baseline: name of those they are compared with, or None.
        floors: a row for each floor.
        undecided: why the two cannot be compared; empty if they are.
        paired: whether the same images are compared.
        comparisons: over all images and by class.
        groups: by group of the metadata.
        costs: ratios.
        flips: images whose prediction changed: `path`, `label`, `old_probability`,
            `new_probability`, `right` (whether the candidate is).
        notes: further warnings, a sentence each.
    """

    candidate: str
    baseline: str | None
    floors: Sequence[Floor]
    undecided: Sequence[str] = ()
    paired: bool = True
    comparisons: Sequence[Comparison] = ()
    groups: Sequence[Comparison] = ()
    costs: Sequence[CostRatio] = ()
    flips: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(
            columns=["path", "label", "old_probability", "new_probability", "right"]
        )
    )
    notes: Sequence[str] = ()

    @property
    def failures(self) -> list[str]:
        """Why the candidate is refused, a sentence each."""
        return [
            *(_floor_sentence(row) for row in self.floors if row.verdict == "fail"),
            *(
                f"{_drop_sentence(row)}, which is significant"
                for row in (*self.comparisons, *self.groups)
                if row.verdict == "fail"
            ),
        ]

    @property
    def warnings(self) -> list[str]:
        """What to look at, a sentence each."""
        return [
            *self.notes,
            *(
                f"{_drop_sentence(row)}, which may be chance"
                if row.p is not None
                else _drop_sentence(row)
                for row in (*self.comparisons, *self.groups)
                if row.verdict == "warn"
            ),
            *(_cost_sentence(row) for row in self.costs if row.verdict == "warn"),
        ]

    @property
    def verdict(self) -> Literal["pass", "pass with warnings", "fail", "cannot tell"]:
        """The whole in a word or three."""
        if self.failures:
            return "fail"
        if self.undecided:
            return "cannot tell"
        return "pass with warnings" if self.warnings else "pass"

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 2 cannot tell."""
        return {"fail": 1, "cannot tell": 2}.get(self.verdict, 0)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold; a value that is not defined is None."""
        content = asdict(replace(self, flips=pd.DataFrame()))
        content["flips"] = self.flips.to_dict("records")
        summary = {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "failures": self.failures,
            "warnings": self.warnings,
        }
        return summary | content


def judge(
    candidate: Results,
    baseline: Results | None,
    settings: Gate,
    *,
    min_group_size: int,
    accept_data_change: bool = False,
    undecided: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Report:
    """Judge a model by its floors and beside a baseline.

    Args:
        candidate: the model's results.
        baseline: results of the model before, or None if there are none.
        settings: floors, tolerances, and source of chance of the intervals.
        min_group_size: smaller groups are shown and not judged.
        accept_data_change: compare even though the test set, the labels or the lack of predictions
            forbid pairing: by two independent samples.
        undecided: why there is no baseline.
        notes: warnings to pass on.

    Returns:
        The report; its verdict is `cannot tell` when there is no baseline, or one that cannot be
        compared with.
    """
    floors = judge_floors(candidate.metrics, settings.floors)
    broken = _broken(candidate)
    if baseline is None:
        return Report(
            candidate=candidate.name,
            baseline=None,
            floors=floors,
            undecided=[*broken, *undecided],
            notes=notes,
        )
    broken += _broken(baseline)
    differences = data_differences(candidate, baseline)
    if broken or (differences and not accept_data_change):
        return Report(
            candidate=candidate.name,
            baseline=baseline.name,
            floors=floors,
            undecided=[*broken, *differences],
            notes=notes,
        )
    if differences:
        comparisons, groups = _unpaired(candidate, baseline, settings, min_group_size)
        flips = Report(candidate.name, None, ()).flips
        notes = [*notes, *(f"accepted: {one}" for one in differences)]
    else:
        pairs = pair(candidate, baseline)
        comparisons, groups = _paired(pairs, candidate, baseline, settings, min_group_size)
        flips = _flips(pairs)
        notes = [*notes, *_lost_columns(candidate, baseline)]
    return Report(
        candidate=candidate.name,
        baseline=baseline.name,
        floors=floors,
        paired=not differences,
        comparisons=comparisons,
        groups=groups,
        costs=compare_costs(candidate.costs, baseline.costs, settings),
        flips=flips,
        notes=notes,
    )


def judge_floors(metrics: Mapping[str, Any], floors: Mapping[str, AtLeast | Any]) -> list[Floor]:
    """Hold metrics against their floors; one that is missing, NaN or no number fails."""
    rows = []
    for name, floor in floors.items():
        value = _number(metrics.get(name))
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


def _number(value: object) -> float | None:
    """Return a finite number, or None for anything else."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None  # type: ignore[arg-type]


def _broken(results: Results) -> list[str]:
    """Say whether metrics and predictions are of different evaluations, which decides nothing."""
    predictions, accuracy = results.predictions, _number(results.metrics.get("accuracy"))
    if predictions is None or accuracy is None:
        return []
    right = float((predictions["label"] == predictions["predicted"]).mean())
    if results.metrics.get("n") == len(predictions) and abs(right - accuracy) < _EPSILON:
        return []
    return [
        f"the metrics of {results.name} say an accuracy of {accuracy:.4f} on "
        f"{results.metrics.get('n')} images, its predictions {right:.4f} on {len(predictions)}: "
        "they are not of one evaluation; run `dvc repro`"
    ]


def data_differences(candidate: Results, baseline: Results) -> list[str]:
    """Say what forbids to compare the two image by image; nothing if it can be done."""
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
    """Return predictions by content of the image, and by number among its copies."""
    if predictions is None:
        raise ValueError("no predictions")
    ordered = predictions.sort_values(["sha256", "path"])
    copy = ordered.groupby("sha256").cumcount()
    return ordered.set_index([ordered["sha256"].astype(str), copy])


def pair(candidate: Results, baseline: Results) -> pd.DataFrame:
    """Return the candidate's predictions with the baseline's beside them.

    Returns:
        The candidate's columns and `old_probability` and `old_predicted`, sorted by path.
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
    labels = pairs["label"].to_numpy(dtype=int)
    old = pairs["old_predicted"].to_numpy(dtype=int) == labels
    new = pairs["predicted"].to_numpy(dtype=int) == labels
    maximum = settings.max_drop

    overall = [_paired_row("accuracy", old, new, settings)]
    classes = [
        _paired_row(f"recall_{name}", old[labels == value], new[labels == value], settings)
        for name, value in LABELS.items()
        if (labels == value).any()
    ]
    groups = [
        _paired_row(f"{column}={group}", old[members], new[members], settings)
        for column, group, members in _groups(pairs)
    ]
    overall, classes, groups = _judge_drops(
        overall, classes, groups, settings, min_group_size=min_group_size
    )
    others = [
        _interval_row("f1", *_f1_differences(labels, pairs, settings), candidate, baseline),
        _interval_row("ece", *_ece_differences(labels, pairs, settings), candidate, baseline),
    ]
    others = [
        _judge_interval(others[0], worse=-1, tolerance=maximum.f1),
        _judge_interval(others[1], worse=1, tolerance=maximum.ece),
        *_informative(candidate, baseline),
    ]
    return [*overall, *classes, *others], groups


def _groups(predictions: pd.DataFrame) -> list[tuple[str, str, np.ndarray]]:
    """Return column, name and members, bool (n,), of each group that is not everybody."""
    found = []
    added = {"old_probability", "old_predicted"}
    for column in predictions.columns.drop([*PREDICTION_COLUMNS, *added], errors="ignore"):
        names = group_names(predictions[column])
        for group in sorted(names.dropna().unique()):
            members = (names == group).fillna(False).to_numpy(dtype=bool)
            if not members.all():
                found.append((str(column), str(group), members))
    return found


def _paired_row(metric: str, old: np.ndarray, new: np.ndarray, settings: Gate) -> Comparison:
    """Compare two models on the same images.

    Args:
        metric: its name.
        old: whether the baseline is right, bool (n,).
        new: whether the candidate is, bool (n,).
        settings: samples and seed of the interval.
    """
    n, gained, lost = len(old), int((new & ~old).sum()), int((old & ~new).sum())
    p = binomtest(lost, gained + lost).pvalue if gained + lost else 1.0
    draws = _resampled_counts(np.array([gained, lost, n - gained - lost]), settings)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, (0.025, 0.975)).tolist()
    return Comparison(
        metric=metric,
        n=n,
        old=float(old.mean()),
        new=float(new.mean()),
        difference=(gained - lost) / n,
        low=low,
        high=high,
        p=float(p),
    )


def _resampled_counts(counts: np.ndarray, settings: Gate) -> np.ndarray:
    """Resample images that are counted by cell: a multinomial draw, int (samples, cells)."""
    chances = counts.ravel() / counts.sum()
    generator = np.random.default_rng(settings.seed)
    return generator.multinomial(counts.sum(), chances, size=settings.bootstrap_samples)


def _f1_differences(labels: np.ndarray, pairs: pd.DataFrame, settings: Gate) -> tuple[float, float]:
    """Return the paired 95 % interval of the difference of F1."""
    old, new = (pairs[name].to_numpy(dtype=int) for name in ("old_predicted", "predicted"))
    counts = np.bincount(labels * 4 + old * 2 + new, minlength=8)
    draws = _resampled_counts(counts, settings).reshape(-1, 2, 2, 2)

    def f1(cells: np.ndarray) -> np.ndarray:
        # 0, as in scikit-learn with zero_division=0, when nothing is or is called male.
        errors = cells[:, 0, 1] + cells[:, 1, 0]
        return 2 * cells[:, 1, 1] / np.maximum(2 * cells[:, 1, 1] + errors, 1)

    differences = f1(draws.sum(axis=2)) - f1(draws.sum(axis=3))
    low, high = np.quantile(differences, (0.025, 0.975)).tolist()
    return low, high


def _ece_differences(
    labels: np.ndarray, pairs: pd.DataFrame, settings: Gate
) -> tuple[float, float]:
    """Return the paired 95 % interval of the difference of the calibration error."""
    old, new = (pairs[name].to_numpy(dtype=float) for name in ("old_probability", "probability"))
    generator = np.random.default_rng(settings.seed)
    differences = np.empty(settings.bootstrap_samples)
    for sample in range(len(differences)):
        drawn = generator.integers(len(labels), size=len(labels))
        differences[sample] = expected_calibration_error(
            labels[drawn], new[drawn]
        ) - expected_calibration_error(labels[drawn], old[drawn])
    low, high = np.quantile(differences, (0.025, 0.975)).tolist()
    return low, high


def _interval_row(
    metric: str, low: float | None, high: float | None, candidate: Results, baseline: Results
) -> Comparison:
    old, new = (_number(one.metrics.get(metric)) for one in (baseline, candidate))
    return Comparison(
        metric=metric,
        n=int(candidate.metrics.get("n", 0)),
        old=old,
        new=new,
        difference=new - old if old is not None and new is not None else None,
        low=low,
        high=high,
    )


def _informative(candidate: Results, baseline: Results) -> list[Comparison]:
    return [_interval_row(name, None, None, candidate, baseline) for name in ("roc_auc", "loss")]


def _judge_interval(row: Comparison, *, worse: int, tolerance: float) -> Comparison:
    """Warn if a metric is worse by more than the tolerance and its interval excludes 0."""
    if row.difference is None or row.low is None or row.high is None:
        return row
    beyond = worse * row.difference > tolerance + _EPSILON
    excluded = row.low > 0 if worse > 0 else row.high < 0
    return replace(row, verdict="warn" if beyond and excluded else "pass")


def _judge_drops(
    overall: Sequence[Comparison],
    classes: Sequence[Comparison],
    groups: Sequence[Comparison],
    settings: Gate,
    *,
    min_group_size: int,
) -> tuple[list[Comparison], list[Comparison], list[Comparison]]:
    """Give the rows that were tested one by one their adjusted p and verdict.

    The three questions share the significance level equally (Bonferroni), and within each it is
    held for all rows together (Holm, A simple sequentially rejective multiple test procedure,
    Scandinavian Journal of Statistics 6, 1979): else one group in forty would fail by luck.
    """
    large = [row for row in groups if row.n >= min_group_size]
    questions = 3 if large else 2
    maximum = settings.max_drop

    def judged(rows: Sequence[Comparison], tolerance: float, *, quiet: bool) -> list[Comparison]:
        adjusted = holm([row.p if row.p is not None else 1.0 for row in rows])
        return [
            _judge_drop(
                row,
                min(1.0, questions * p),
                tolerance,
                settings.significance,
                # Among many groups some always drop: only one that seems significant is told.
                warn=not quiet or (row.p is not None and row.p < settings.significance),
            )
            for row, p in zip(rows, adjusted, strict=True)
        ]

    told = iter(judged(large, maximum.group, quiet=True))
    small = f"fewer than {min_group_size} images: not judged"
    return (
        judged(overall, maximum.accuracy, quiet=False),
        judged(classes, maximum.recall, quiet=False),
        [
            next(told) if row.n >= min_group_size else replace(row, p=None, note=small)
            for row in groups
        ],
    )


def _judge_drop(
    row: Comparison, p: float, tolerance: float, significance: float, *, warn: bool
) -> Comparison:
    # One image alone is never a regression, however few there are.
    allowed = max(tolerance, 1 / row.n) + _EPSILON
    beyond = row.difference is not None and -row.difference > allowed
    verdict: Verdict = "pass"
    if beyond and p < significance:
        verdict = "fail"
    elif beyond and warn:
        verdict = "warn"
    return replace(row, p=p, verdict=verdict)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number, in their order, as Holm (1979) does."""
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def _unpaired(
    candidate: Results, baseline: Results, settings: Gate, min_group_size: int
) -> tuple[list[Comparison], list[Comparison]]:
    """Compare two models on different images, as two independent samples."""
    old, new = (_right_by_label(one) for one in (baseline, candidate))
    overall = [_unpaired_row("accuracy", sum_of(old), sum_of(new), settings)]
    classes = [
        _unpaired_row(f"recall_{name}", old[name], new[name], settings)
        for name in LABELS
        if old[name][1] and new[name][1]
    ]
    groups = []
    if candidate.predictions is not None and baseline.predictions is not None:
        before = {
            (column, group): _right(baseline.predictions[members])
            for column, group, members in _groups(baseline.predictions)
        }
        groups = [
            _unpaired_row(
                f"{column}={group}",
                before[column, group],
                _right(candidate.predictions[members]),
                settings,
            )
            for column, group, members in _groups(candidate.predictions)
            if (column, group) in before
        ]
    overall, classes, groups = _judge_drops(
        overall, classes, groups, settings, min_group_size=min_group_size
    )
    others = [_interval_row(name, None, None, candidate, baseline) for name in ("f1", "ece")]
    return [*overall, *classes, *others, *_informative(candidate, baseline)], groups


def _right_by_label(results: Results) -> dict[str, tuple[int, int]]:
    """Return, for each label, how many images are predicted rightly, and how many there are."""
    confusion = results.metrics["confusion"]
    return {
        name: (
            int(confusion[f"{name}_as_{name}"]),
            sum(int(confusion[f"{name}_as_{guess}"]) for guess in LABELS),
        )
        for name in LABELS
    }


def sum_of(counts: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Return the sums of pairs."""
    return sum(right for right, _ in counts.values()), sum(n for _, n in counts.values())


def _right(predictions: pd.DataFrame) -> tuple[int, int]:
    return int((predictions["label"] == predictions["predicted"]).sum()), len(predictions)


def _unpaired_row(
    metric: str, old: tuple[int, int], new: tuple[int, int], settings: Gate
) -> Comparison:
    """Compare counts (right, all) of two samples by Fisher's exact test."""
    (old_right, old_n), (new_right, new_n) = old, new
    table = [[new_right, new_n - new_right], [old_right, old_n - old_right]]
    generator = np.random.default_rng(settings.seed)
    drawn = generator.binomial(
        (new_n, old_n),
        (new_right / new_n, old_right / old_n),
        size=(settings.bootstrap_samples, 2),
    )
    low, high = np.quantile(drawn[:, 0] / new_n - drawn[:, 1] / old_n, (0.025, 0.975)).tolist()
    return Comparison(
        metric=metric,
        n=new_n,
        old=old_right / old_n,
        new=new_right / new_n,
        difference=new_right / new_n - old_right / old_n,
        low=low,
        high=high,
        p=float(fisher_exact(table).pvalue),
    )


def compare_costs(
    candidate: Mapping[str, float], baseline: Mapping[str, float], settings: Gate
) -> list[CostRatio]:
    """Return the ratio of each cost, with a warning beyond its tolerance."""
    rows = []
    for name in dict.fromkeys([*baseline, *candidate]):
        old, new = (_number(costs.get(name)) for costs in (baseline, candidate))
        ratio = new / old if old and new is not None else None
        if name.endswith("_per_second"):
            limit = settings.cost.min_speed_ratio
            beyond = ratio is not None and ratio < limit
        else:
            size = name.startswith("size_")
            limit = settings.cost.max_size_ratio if size else settings.cost.max_time_ratio
            beyond = ratio is not None and ratio > limit
        unknown = ratio is None
        verdict: Verdict = "info" if unknown else "warn" if beyond else "pass"
        rows.append(CostRatio(name, old, new, ratio, limit, verdict))
    return rows


def _flips(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the images whose prediction changed, those that became wrong first."""
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
    return [f"groups are no longer judged by {', '.join(lost)}: the metadata lacks it"] * bool(
        len(lost)
    )


def _floor_sentence(row: Floor) -> str:
    if row.value is None:
        return f"{row.metric} is missing or NaN, and must be {row.direction} {row.limit:g}"
    return f"{row.metric} is {row.value:.4f}, and must be {row.direction} {row.limit:g}"


def _drop_sentence(row: Comparison) -> str:
    text = f"{row.metric} went from {row.old:.4f} to {row.new:.4f} on {row.n} images"
    if row.p is not None:
        return f"{text} (p = {row.p:.2g})"
    return text


def _cost_sentence(row: CostRatio) -> str:
    return f"{row.metric} is {row.ratio:.2f} times the baseline's; {row.limit:g} is the tolerance"
