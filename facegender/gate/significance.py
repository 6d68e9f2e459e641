"""Differences between two models with intervals and p-values, paired by image or unpaired.

Throughout, `old` belongs to the baseline, `new` to the candidate, and a difference is new minus
old. Intervals are 95 %: score intervals of differences of shares, percentile bootstrap intervals
of F1 and calibration error (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter
13). p is exact and two-sided.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, fisher_exact

from facegender.evaluation.groups import difference_interval
from facegender.evaluation.metrics import expected_calibration_error, paired_interval


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
