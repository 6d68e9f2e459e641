"""Differences between two models with intervals and p-values, paired by image or unpaired.

Throughout, `old` belongs to the baseline, `new` to the candidate, and a difference is new minus
old. Intervals are 95 %: score intervals of differences of shares, percentile bootstrap intervals
of F1 and calibration error (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter
13). p is exact and two-sided.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, fisher_exact, norm

from facegender.evaluation.groups import difference_interval
from facegender.evaluation.metrics import expected_calibration_error

_Z = float(norm.ppf(0.975))


@dataclass(frozen=True)
class Resampling:
    """Number of resamples and seed of a bootstrap."""

    samples: int
    seed: int

    def generator(self) -> np.random.Generator:
        """Return a fresh generator, so that intervals do not depend on each other."""
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


def paired_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Return the score interval of the difference of two shares of the same images.

    Tango, Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design, Statistics in Medicine 17, 1998: the differences that a score test does
    not reject. A bootstrap would be too narrow for few images, and has no width when the models
    agree on all of them.

    Args:
        gained: images that only the candidate gets right.
        lost: images that only the baseline gets right.
        n: all images.
    """
    observed = (gained - lost) / n

    def score(difference: float) -> float:
        b = (2 * n - gained + lost) * difference - gained - lost
        c = -lost * difference * (1 - difference)
        share_lost = (math.sqrt(max(0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * share_lost + difference * (1 - difference))
        return (gained - lost - n * difference) / math.sqrt(max(variance, 1e-300))

    def bound(sign: int) -> float:
        if observed == sign:
            return float(sign)
        nearly = sign * (1 - 1e-12)
        return float(brentq(lambda value: score(value) + sign * _Z, observed, nearly))

    return bound(-1), bound(1)


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


def paired_f1_interval(
    labels: np.ndarray, old: np.ndarray, new: np.ndarray, resampling: Resampling
) -> tuple[float, float]:
    """Return the interval of the difference of F1; all arrays are int (n,) of 0 and 1."""
    cells = np.bincount(labels * 4 + old * 2 + new, minlength=8)
    draws = _resampled_counts(cells, resampling).reshape(-1, 2, 2, 2)
    # Counts by label and prediction of one model, summed over the other's predictions.
    return _interval(_f1(draws.sum(axis=2)) - _f1(draws.sum(axis=3)))


def _f1(confusion: np.ndarray) -> np.ndarray:
    # F1 is 0, as in scikit-learn with zero_division=0, when nothing is or is called male.
    right, errors = confusion[:, 1, 1], confusion[:, 0, 1] + confusion[:, 1, 0]
    return 2 * right / np.maximum(2 * right + errors, 1)


def paired_ece_interval(
    labels: np.ndarray, old: np.ndarray, new: np.ndarray, resampling: Resampling
) -> tuple[float, float]:
    """Return the interval of the difference of the calibration errors.

    Args:
        labels: int (n,).
        old: P(male) by the baseline, float (n,).
        new: P(male) by the candidate, float (n,).
        resampling: bootstrap of the images.
    """
    generator = resampling.generator()
    differences = np.empty(resampling.samples)
    for sample in range(resampling.samples):
        drawn = generator.integers(len(labels), size=len(labels))
        before = expected_calibration_error(labels[drawn], old[drawn])
        differences[sample] = expected_calibration_error(labels[drawn], new[drawn]) - before
    return _interval(differences)


def _resampled_counts(counts: np.ndarray, resampling: Resampling) -> np.ndarray:
    """Resample images counted by cell: a multinomial draw, int (samples, cells)."""
    total = int(counts.sum())
    return resampling.generator().multinomial(total, counts / total, size=resampling.samples)


def _interval(differences: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(differences, (0.025, 0.975)).tolist()
    return low, high
