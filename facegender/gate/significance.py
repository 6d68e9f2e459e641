"""Differences between two models with intervals and p-values, paired by image or unpaired.

Throughout, `old` belongs to the baseline, `new` to the candidate, and a difference is new minus
old. Intervals are 95 %. p is two-sided.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, fisher_exact

from facegender.evaluation.groups import difference_interval
from facegender.evaluation.metrics import BINS, bins_of, f1_interval, paired_interval

_BLOCK = 1_000_000  # images whose probabilities are swapped at a time


@dataclass(frozen=True)
class Resampling:
    """Number of random draws and their seed."""

    samples: int
    seed: int

    def generator(self) -> np.random.Generator:
        """Return a fresh generator, so that results do not depend on each other."""
        return np.random.default_rng(self.seed)


@dataclass(frozen=True)
class Difference:
    """A share of images under two models."""

    old: float
    new: float
    difference: float
    low: float
    high: float
    p: float


def paired_difference(old: np.ndarray, new: np.ndarray) -> Difference:
    """Compare how often two models are right on the same images, by McNemar's exact test.

    McNemar, Note on the sampling error of the difference between correlated proportions or
    percentages, Psychometrika 12, 1947: if neither model is better, each is equally likely to be
    the one that is right where only one is.

    Args:
        old: whether the baseline is right, bool (n,).
        new: whether the candidate is right on the same image, bool (n,).
    """
    n, gained, lost = len(old), int((new & ~old).sum()), int((old & ~new).sum())
    low, high = paired_interval(gained, lost, n)
    return Difference(
        old=float(old.mean()),
        new=float(new.mean()),
        difference=(gained - lost) / n,
        low=low,
        high=high,
        p=float(binomtest(lost, gained + lost).pvalue) if gained + lost else 1.0,
    )


def unpaired_difference(old: tuple[int, int], new: tuple[int, int]) -> Difference:
    """Compare how often two models are right on different images, by Fisher's exact test.

    Args:
        old: number of images that the baseline gets right, and number of images.
        new: the same for the candidate.
    """
    (old_right, old_n), (new_right, new_n) = old, new
    before, after = old_right / old_n, new_right / new_n
    low, high = difference_interval(new, old)
    table = [[new_right, new_n - new_right], [old_right, old_n - old_right]]
    return Difference(
        old=before,
        new=after,
        difference=after - before,
        low=low,
        high=high,
        p=float(fisher_exact(table).pvalue),
    )


def paired_f1_interval(labels: np.ndarray, old: np.ndarray, new: np.ndarray) -> tuple[float, float]:
    """Return the interval of the difference of F1; all arrays are int (n,) of 0 and 1.

    The method of variance estimates recovery combines the two models' intervals (Zou, Toward using
    confidence intervals to compare correlations, Psychological Methods 12, 2007). Their correlation
    comes from the derivatives of F1.
    """
    cells = np.bincount(labels * 4 + old * 2 + new, minlength=8).reshape(2, 2, 2)
    # Counts by label and prediction of one model, summed over the other's predictions.
    before, after = cells.sum(axis=2), cells.sum(axis=1)
    (low0, high0), (low1, high1) = f1_interval(before), f1_interval(after)
    f0, f1 = _f1(before), _f1(after)
    r = _f1_correlation(cells)

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 + other**2 - 2 * r * one * other))

    return f1 - f0 - reach(f1 - low1, high0 - f0), f1 - f0 + reach(high1 - f1, f0 - low0)


def _f1(confusion: np.ndarray) -> float:
    # F1 is 0, as in scikit-learn with zero_division=0, if no image is male or called male.
    right, errors = int(confusion[1, 1]), int(confusion[0, 1] + confusion[1, 0])
    return 2 * right / max(2 * right + errors, 1)


def _f1_correlation(cells: np.ndarray) -> float:
    """Return the correlation of two models' F1 over test sets, given counts (2, 2, 2)."""
    # Half an image is added to each cell, so that an empty one does not count as impossible.
    shares = (cells + 0.5) / (cells + 0.5).sum()
    slopes = []
    for axis in (2, 1):
        of_model = shares.sum(axis=axis)
        right, errors = of_model[1, 1], of_model[0, 1] + of_model[1, 0]
        slope = np.array([[0, -right], [-right, errors]]) / (2 * right + errors) ** 2
        slope = np.broadcast_to(np.expand_dims(slope, axis), shares.shape)
        slopes.append(slope - (slope * shares).sum())
    old, new = slopes
    variances = (old**2 * shares).sum() * (new**2 * shares).sum()
    return float((old * new * shares).sum() / math.sqrt(variances))


def paired_ece_p(
    labels: np.ndarray, old: np.ndarray, new: np.ndarray, resampling: Resampling
) -> float:
    """Return p of a permutation test of the difference of the calibration errors.

    If the models are alike, each image could as well have had its two probabilities the other way
    round (Ernst, Permutation methods: a basis for exact inference, Statistical Science 19, 2004).
    There is no interval: what chance adds to a calibration error hides the true difference, so that
    a bootstrap's covers 0.0 to 1.0 where it claims 0.95 (docs/gate.md).

    Args:
        labels: int (n,).
        old: P(male) by the baseline, float (n,).
        new: P(male) by the candidate, float (n,).
        resampling: draws of the images that are swapped.
    """
    n, samples = len(labels), resampling.samples

    def gaps(probabilities: np.ndarray) -> np.ndarray:
        # The calibration error is the sum over the bins of |sum of P - label in it|, by n. So what
        # each image adds to each bin makes all draws one product.
        table = np.zeros((n, BINS))
        table[np.arange(n), bins_of(probabilities)] = probabilities - labels
        return table

    before, after = gaps(old), gaps(new)
    change = after - before

    def difference(moved: np.ndarray) -> np.ndarray:
        return np.abs(after.sum(0) - moved).sum(-1) - np.abs(before.sum(0) + moved).sum(-1)

    observed = abs(difference(np.zeros(BINS))) - 1e-12 * n  # for rounding
    generator = resampling.generator()
    as_large = 0
    step = max(1, _BLOCK // n)
    for start in range(0, samples, step):
        swapped = generator.random((min(step, samples - start), n)) < 0.5
        as_large += int((np.abs(difference(swapped @ change)) >= observed).sum())
    return (1 + as_large) / (1 + samples)
