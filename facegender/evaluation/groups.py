"""How good predictions are by group of the metadata, and how groups differ from the rest.

A group is a value of one metadata column, or a pair of values of two crossed columns: errors can
gather where two groups meet (Buolamwini and Gebru, Gender Shades, FAT* 2018).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import fisher_exact

from facegender.errors import UserError
from facegender.evaluation.metrics import wilson_interval
from facegender.labels import LABELS

# Columns of predictions that are not metadata.
NO_METADATA = ("path", "label", "probability", "predicted", "sha256")
# Columns that the gate adds to compare two models.
BASELINE_COLUMNS = ("old_probability", "old_predicted")
OTHER = "(other)"
MAX_GROUPS = 20
# What evaluate.groups holds: columns, and pairs of columns to cross; None for every column alone.
Chosen = Sequence[str | Sequence[str]] | None


@dataclass(frozen=True)
class Groups:
    """The groups of some images.

    Attributes:
        members: column, group, and whether each image belongs to it, bool (n,).
        left_out: images and columns outside all groups, one sentence each.
    """

    members: Sequence[tuple[str, str, np.ndarray]]
    left_out: Sequence[str]


def find_groups(table: pd.DataFrame, chosen: Chosen, minimum: int) -> Groups:
    """Return the groups that the metadata of images define, and what they leave out.

    A value that all images share is not a group.

    Args:
        table: one row per image; each column outside NO_METADATA is metadata.
        chosen: columns and pairs of columns, or None for every column.
        minimum: images below which a value of a column with many is put into OTHER.

    Raises:
        UserError: `chosen` names a column that the metadata lack.
    """
    columns = [str(name) for name in table.columns if name not in NO_METADATA + BASELINE_COLUMNS]
    asked = [[one] if isinstance(one, str) else list(one) for one in chosen or ()]
    named = {name for pair in asked for name in pair}
    if unknown := sorted(named - set(columns)):
        raise UserError(
            f"evaluate.groups names {', '.join(unknown)}, which the metadata lack; they have "
            f"{', '.join(columns) or 'no columns'}. Correct it, or set it to null for all columns."
        )
    left_out = []
    if chosen is None:
        asked = [[name] for name in columns]
    elif others := [name for name in columns if name not in named]:
        left_out.append(f"not in evaluate.groups: {', '.join(others)}")
    names = {name: group_names(table[name], minimum) for pair in asked for name in pair}
    for name, values in names.items():
        left_out += _left_out(name, table[name], values)
    members = []
    for pair in asked:
        values, *crossed = (
            names[name] if len(pair) == 1 else _quoted(names[name]) for name in pair
        )
        for other in crossed:
            values = values + ", " + other
        codes, found = pd.factorize(values, sort=True)
        members += [
            (" x ".join(pair), str(group), codes == code)
            for code, group in enumerate(found)
            if not (codes == code).all()
        ]
    return Groups(members, left_out)


def _quoted(values: pd.Series) -> pd.Series:
    """Quote values with a comma or a quote as CSV does, so that no two pairs are joined alike."""
    quoted = '"' + values.str.replace('"', '""') + '"'
    return values.mask(values.str.contains('[",]', na=False), quoted)


def _left_out(name: str, values: pd.Series, groups: pd.Series) -> Iterator[str]:
    if missing := int(groups.isna().sum()):
        yield f"{name}: missing for {missing} images"
    if (rare := values[groups == OTHER].nunique()) > 1:
        words = values[_numbers(values).isna() & values.notna()]
        # One `unknown` among ages leaves no bands.
        why = f", because {words.iloc[0]!r} is not a number" if 2 * len(words) < len(values) else ""
        yield f"{name}: {rare} rare values are one group, {OTHER}{why}"
    elif groups.nunique() == 1 and not missing:
        yield f"{name}: one group only, {groups.dropna().iloc[0]}"


def group_names(values: pd.Series, minimum: int = 1) -> pd.Series:
    """Return the group of each value of a metadata column.

    A column of up to MAX_GROUPS values has a group for each. With more, numbers are cut into bands
    of ten, as for ages, or else of a round width that makes up to twenty. Of other values, the most
    frequent have a group each, and the rest are OTHER. A missing value belongs to no group.

    Args:
        values: column of text or numbers.

    Returns:
        A name or NA for each value, indexed like `values`.
    """
    if values.nunique() <= MAX_GROUPS:
        return values.astype("string")
    numbers = _numbers(values)
    if np.isfinite(numbers[values.notna()].to_numpy(dtype=float, na_value=np.nan)).all():
        return _bands(numbers)
    counts = values.value_counts()
    kept = counts[counts >= minimum].index[: MAX_GROUPS - 1]
    return values.where(values.isin(kept) | values.isna(), OTHER).astype("string")


def _numbers(values: pd.Series) -> pd.Series:
    """Return text as numbers, NA where it is none; a comma may be a decimal point."""
    text = values.astype("string")
    decimals = text.str.extract(r"^[+-]?[0-9]+,([0-9]+)$", expand=False).dropna()
    if (decimals.str.len() != 3).any():  # else it may separate thousands: 1,000
        text = text.str.replace(",", ".")
    return pd.to_numeric(text, errors="coerce").astype("Float64")


def _bands(numbers: pd.Series) -> pd.Series:
    low, high = float(numbers.min()), float(numbers.max())
    whole = bool((numbers.dropna() % 1 == 0).all())
    exponent = math.floor(math.log10(high - low))
    steps = (step * 10.0**power for power in (exponent - 1, exponent) for step in (1, 2, 5))
    widths = [10.0, *steps] if high - low >= MAX_GROUPS else steps
    width = next(
        one for one in widths if math.floor(high / one) - math.floor(low / one) < MAX_GROUPS
    )
    # Rounded, because 0.3 / 0.1 is below 3.
    start = np.floor((numbers / width).round(9)).astype("Int64")
    if whole and width >= 1:
        first = start * int(width)
        return first.astype("string") + "-" + (first + int(width) - 1).astype("string")
    digits = max(0, -math.floor(math.log10(width)))
    names = {
        int(band): f"{band * width:.{digits}f} to {(band + 1) * width:.{digits}f}"
        for band in start.dropna().unique()
    }
    return start.map(names).astype("string")


def group_metrics(
    predictions: pd.DataFrame, *, threshold: float, minimum: int, chosen: Chosen = None
) -> pd.DataFrame:
    """Return accuracy and recalls of each group, compared with all images outside it.

    Args:
        predictions: columns `label` and `probability`; metadata in all outside NO_METADATA.
        minimum: images below which a group is marked `small`.

    Returns:
        One row per group: `column`, `group`, `n`, then `accuracy`, `recall_female` and
        `recall_male`, each with its 95 % Wilson interval (`accuracy_low`, `accuracy_high`);
        `difference`, the accuracy minus that of the other images, and `error_ratio`, the error
        rate divided by theirs, with 95 % intervals; `p` of Fisher's exact test of that difference,
        adjusted by Holm's method over all groups that are not small, for which it is NaN; `small`.
    """
    labels = predictions["label"].to_numpy(dtype=int)
    probabilities = predictions["probability"].to_numpy(dtype=float)
    right = labels == (probabilities >= threshold)
    rows = []
    for column, group, members in find_groups(predictions, chosen, minimum).members:
        n = int(members.sum())
        inside, rest = (
            (int(right[images].sum()), int(images.sum())) for images in (members, ~members)
        )
        row = {"column": column, "group": group, "n": n, "accuracy": inside[0] / n}
        row |= _bounds("accuracy", wilson_interval(*inside))
        for name, value in LABELS.items():
            of_class = right[members & (labels == value)]
            row[f"recall_{name}"] = of_class.mean() if len(of_class) else math.nan
            row |= _bounds(f"recall_{name}", wilson_interval(int(of_class.sum()), len(of_class)))
        row["difference"] = inside[0] / n - rest[0] / rest[1]
        row |= _bounds("difference", difference_interval(inside, rest))
        errors, others = (n - inside[0], n), (rest[1] - rest[0], rest[1])
        row["error_ratio"] = errors[0] / n / (others[0] / others[1]) if others[0] else math.nan
        row |= _bounds("error_ratio", ratio_interval(errors, others))
        table = [[inside[0], errors[0]], [rest[0], others[0]]]
        row["p"] = math.nan if n < minimum else float(fisher_exact(table).pvalue)
        rows.append(row | {"small": n < minimum})
    measures = ["accuracy", *(f"recall_{name}" for name in LABELS), "difference", "error_ratio"]
    columns = [name + bound for name in measures for bound in ("", "_low", "_high")]
    found = pd.DataFrame(rows, columns=["column", "group", "n", *columns, "p", "small"])
    judged = found["p"].notna()
    found.loc[judged, "p"] = holm(found.loc[judged, "p"].tolist())
    return found


def _bounds(name: str, interval: tuple[float, float]) -> dict[str, float]:
    return {f"{name}_low": interval[0], f"{name}_high": interval[1]}


def difference_interval(one: tuple[int, int], other: tuple[int, int]) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two shares of different images.

    Newcombe, Interval estimation for the difference between independent proportions, Statistics in
    Medicine 17, 1998, method 10: from two Wilson intervals.

    Args:
        one: count, and number of images.
        other: the same for the share that is subtracted.
    """
    (first, (low1, high1)), (second, (low2, high2)) = (
        (count / n, wilson_interval(count, n)) for count, n in (one, other)
    )
    difference = first - second
    return (
        difference - math.hypot(first - low1, high2 - second),
        difference + math.hypot(high1 - first, second - low2),
    )


def ratio_interval(one: tuple[int, int], other: tuple[int, int]) -> tuple[float, float]:
    """Return the 95 % interval of the ratio of two shares of different images.

    Donner and Zou, Closed-form confidence intervals for functions of the normal mean and standard
    deviation, Statistical Methods in Medical Research 21, 2012: from two Wilson intervals. The
    upper end is infinite if the divisor may be 0.

    Args:
        one: count, and number of images.
        other: the same for the divisor.
    """
    lowest, lowest_inverse = _lowest_ratio(one, other), _lowest_ratio(other, one)
    return lowest, 1 / lowest_inverse if lowest_inverse else math.inf


def _lowest_ratio(one: tuple[int, int], other: tuple[int, int]) -> float:
    (first, low), (second, high) = (
        (count / n, wilson_interval(count, n)[end]) for end, (count, n) in enumerate((one, other))
    )
    product, square = first * second, low * (2 * first - low)
    root = math.sqrt(max(0.0, product**2 - square * high * (2 * second - high)))
    # Rearranged, because the paper's form is 0 / 0 if `high` is twice `second`.
    return square / (product + root) if square else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number, in the same order.

    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of
    Statistics 6, 1979.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
