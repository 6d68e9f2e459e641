"""Measure how often each interval that the project prints covers the truth, where it claims 0.95.

    python -m bench.interval_coverage
    python -m bench.interval_coverage --bootstrap

The second shows what percentile bootstraps would cover, which the project does not print. Each draw
has its own models, groups and test set: few images allow so few different intervals that the
coverage at one true value says little. docs/gate.md has the table that this prints.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.special import expit
from tabulate import tabulate

from bench.recipes import FEWEST_GROUPS, mean_interval, share_difference_interval, share_interval
from facegender.evaluation.groups import difference_interval, ratio_interval
from facegender.evaluation.metrics import (
    BINS,
    bins_of,
    f1_interval,
    paired_interval,
    wilson_interval,
)
from facegender.gate.significance import paired_f1_interval

SIZES = (36, 360, 1102, 10_000)
_RESAMPLES = 400
_Case = tuple[float, tuple[float, float]]  # the truth, and an interval for it
_Cases = Callable[[int, int, int], Iterator[_Case]]  # of images, draws and a seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=2000, help="test sets a cell (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bootstrap", action="store_true", help="percentile bootstraps instead")
    args = parser.parse_args()
    sizes, chosen = (SIZES[:3], _BOOTSTRAPS) if args.bootstrap else (SIZES, _CASES)
    table = coverages(sizes, args.draws, args.seed, chosen)
    rows = [
        [name, *("-" if math.isnan(value) else f"{value:.3f}" for value in values)]
        for name, values in table.items()
    ]
    print(tabulate(rows, ["interval", *map(str, sizes)], tablefmt="pipe", disable_numparse=True))


def coverages(
    sizes: Sequence[int], draws: int, seed: int, chosen: Mapping[str, _Cases] | None = None
) -> dict[str, list[float]]:
    """Return the coverage of each interval at each number of images; NaN if none is printed."""
    found = {}
    for name, cases in (chosen or _CASES).items():
        held = [
            [low <= truth <= high for truth, (low, high) in cases(n, draws, seed)] for n in sizes
        ]
        found[name] = [float(np.mean(each)) if each else math.nan for each in held]
    return found


def _shares(n: int, draws: int, seed: int) -> Iterator[_Case]:
    generator = np.random.default_rng(seed)
    for share in generator.uniform(0.8, 0.99, draws):
        yield share, wilson_interval(int(generator.binomial(n, share)), n)


def _paired_differences(n: int, draws: int, seed: int) -> Iterator[_Case]:
    generator = np.random.default_rng(seed)
    for gained, lost in generator.uniform(0.02, 0.15, (draws, 2)):
        won, missed, _ = generator.multinomial(n, [gained, lost, 1 - gained - lost])
        yield gained - lost, paired_interval(int(won), int(missed), n)


def _of_two_groups(
    interval: Callable[[tuple[int, int], tuple[int, int]], tuple[float, float]],
    truth: Callable[[float, float], float],
) -> _Cases:
    def cases(n: int, draws: int, seed: int) -> Iterator[_Case]:
        generator = np.random.default_rng(seed)
        for one, other in generator.uniform(0.03, 0.3, (draws, 2)):
            counts = generator.binomial((n, 3 * n), (one, other)).tolist()
            yield truth(one, other), interval((counts[0], n), (counts[1], 3 * n))

    return cases


def _model_shares(generator: np.random.Generator) -> np.ndarray:
    """Return the shares of label, old and new prediction, (2, 2, 2), of two related models."""
    male = generator.uniform(0.35, 0.65)
    right = generator.uniform(0.5, 0.95, 2)  # of each model on the hard images; 0.99 on the others
    shares = np.zeros((2, 2, 2))
    for share, (old, new) in ((0.2, right), (0.8, (0.99, 0.99))):
        for label, weight in enumerate((1 - male, male)):
            by_old, by_new = (np.where(np.arange(2) == label, one, 1 - one) for one in (old, new))
            shares[label] += share * weight * np.outer(by_old, by_new)
    return shares


def _f1(confusion: np.ndarray) -> float:
    return float(2 * confusion[1, 1] / (2 * confusion[1, 1] + confusion[0, 1] + confusion[1, 0]))


def _f1s(n: int, draws: int, seed: int) -> Iterator[_Case]:
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        shares = _model_shares(generator).sum(axis=1)
        counts = generator.multinomial(n, shares.ravel()).reshape(2, 2)
        yield _f1(shares), f1_interval(counts)


def _f1_differences(n: int, draws: int, seed: int) -> Iterator[_Case]:
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        shares = _model_shares(generator)
        counts = generator.multinomial(n, shares.ravel())
        cells = np.repeat(np.arange(8), counts)
        truth = _f1(shares.sum(axis=1)) - _f1(shares.sum(axis=2))
        yield truth, paired_f1_interval(cells // 4, cells // 2 % 2, cells % 2)


def _grouped(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Return label, group, (n,), and the probabilities of two related models, (2, n).

    Half of the images are in pairs of near duplicates, which the models find alike.
    """
    group = np.arange(n)
    group[n // 2 :] -= (group[n // 2 :] - n // 2 + 1) // 2
    own, errors = generator.normal(0, 12, n), generator.normal(0, 2, (2, n))
    label = (generator.random(n) < expit(own))[group]
    logits = (own + 0.8 * generator.normal(0, 2, n) + 0.6 * errors)[:, group]
    return label, group, np.clip(expit(logits), 1e-6, 1 - 1e-6)


def _grouped_cases(
    interval: Callable[[np.ndarray, pd.Series], tuple[float, float]],
    values: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> _Cases:
    def cases(n: int, draws: int, seed: int) -> Iterator[_Case]:
        if n < FEWEST_GROUPS:
            return  # the bench of recipes then prints none
        generator = np.random.default_rng(seed)
        label, _, probabilities = _grouped(generator, 2_000_000)
        truth = float(values(label, probabilities).mean())
        for _ in range(draws):
            label, group, probabilities = _grouped(generator, n)
            yield truth, interval(values(label, probabilities), pd.Series(group))

    return cases


def _right(label: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    return ((probabilities >= 0.5) == label).astype(float)


def _loss(label: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    return -np.log(np.where(label, probabilities, 1 - probabilities))


def _bootstrapped_f1s(n: int, draws: int, seed: int) -> Iterator[_Case]:
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        shares = _model_shares(generator).sum(axis=1)
        counts = generator.multinomial(n, shares.ravel())
        _, *errors, right = generator.multinomial(n, counts / n, size=_RESAMPLES).T
        yield _f1(shares), _percentiles(2 * right / np.maximum(2 * right + sum(errors), 1))


def _bootstrapped_ece_differences(slope: float, shift: float) -> _Cases:
    """Return cases of a calibrated model, and one whose logit is stretched and shifted."""

    def gaps(generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the gap of each image in its bin under both models, (n, BINS) each."""
        logit = generator.normal(0, 3, n)
        label = generator.random(n) < expit(logit)
        noisy = slope * logit + shift + generator.normal(0, 0.3, n)
        gaps = []
        for probability in (expit(logit), expit(noisy)):
            of_model = np.zeros((n, BINS), np.float32)
            of_model[np.arange(n), bins_of(probability)] = probability - label
            gaps.append(of_model)
        return gaps[0], gaps[1]

    def difference(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        return np.abs(new).sum(axis=-1) - np.abs(old).sum(axis=-1)

    def cases(n: int, draws: int, seed: int) -> Iterator[_Case]:
        generator = np.random.default_rng(seed)
        old, new = gaps(generator, 500_000)
        truth = float(difference(old.mean(axis=0), new.mean(axis=0)))
        for _ in range(draws):
            old, new = gaps(generator, n)
            weights = generator.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) / n
            yield truth, _percentiles(difference(weights @ old, weights @ new))

    return cases


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975)).tolist()
    return low, high


_CASES: dict[str, _Cases] = {
    "share (accuracy, recall, precision; Wilson)": _shares,
    "difference, same images (Tango)": _paired_differences,
    "difference, other images or groups (Newcombe)": _of_two_groups(
        difference_interval, lambda one, other: one - other
    ),
    "ratio of error rates (Donner and Zou)": _of_two_groups(
        ratio_interval, lambda one, other: one / other
    ),
    "F1 (Wilson, of a share)": _f1s,
    "difference of F1, same images (Zou)": _f1_differences,
    "accuracy, grouped images (Wilson)": _grouped_cases(
        share_interval, lambda label, models: _right(label, models)[0]
    ),
    "difference of accuracy, grouped images (Tango)": _grouped_cases(
        share_difference_interval, lambda label, models: np.diff(_right(label, models), axis=0)[0]
    ),
    "difference of log loss, grouped images (t)": _grouped_cases(
        mean_interval, lambda label, models: np.diff(_loss(label, models), axis=0)[0]
    ),
}
_BOOTSTRAPS: dict[str, _Cases] = {
    "F1": _bootstrapped_f1s,
    "difference of ECE, equal models": _bootstrapped_ece_differences(1, 0),
    "difference of ECE, logit 1.6 times as far from 0": _bootstrapped_ece_differences(1.6, 0),
    "difference of ECE, logit shifted by 0.8": _bootstrapped_ece_differences(1, 0.8),
}


if __name__ == "__main__":
    main()
