"""Floors: what a model must reach, whatever the baseline was."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from facegender.evaluation.groups import Chosen, holm
from facegender.evaluation.metrics import BINS, bins_of
from facegender.gate.costs import finite
from facegender.gate.pairing import find_known_groups
from facegender.gate.significance import Resampling
from facegender.gate.verdict import Floor
from facegender.params import AtLeast, AtMost, Gate

WORST_GROUP = "worst_group"


def judge_floors(
    metrics: Mapping[str, Any],
    predictions: pd.DataFrame | None,
    settings: Gate,
    *,
    min_group_size: int,
    chosen: Chosen,
) -> list[Floor]:
    """Compare metrics with their floors; a value that is missing or not finite fails.

    Two metrics are so noisy that a value beyond the limit fails only if it is significant, and
    otherwise warns: the calibration error, and `worst_group`, the lowest accuracy of a group.

    Args:
        metrics: result of `classification_metrics`.
        predictions: predictions with metadata, or None if missing.
        settings: floors, and seed and number of resamples.
        min_group_size: images below which a group is not judged.
    """
    rows = []
    for name, floor in settings.floors.items():
        value, chance, note = finite(metrics.get(name)), False, ""
        if name == WORST_GROUP and predictions is not None and isinstance(floor, AtLeast):
            value, chance, note = _worst_group(
                predictions, floor.at_least, settings, min_group_size, chosen
            )
        elif name == "ece" and predictions is not None and isinstance(floor, AtMost):
            noise = _ece_noise(predictions, Resampling(settings.bootstrap_samples, settings.seed))
            chance = value is not None and value - noise <= floor.at_most
            note = f"chance alone makes up to {noise:.4f}"
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
                verdict="pass" if reached else "warn" if chance else "fail",
                note=note,
            )
        )
    return rows


def _worst_group(
    predictions: pd.DataFrame, limit: float, settings: Gate, min_group_size: int, chosen: Chosen
) -> tuple[float | None, bool, str]:
    """Return the lowest accuracy of a group, whether chance explains that it is low, and a note."""
    right = (predictions["label"] == predictions["predicted"]).to_numpy()
    judged = [
        (right[members].mean(), f"{column}={group}", right[members])
        for column, group, members in find_known_groups(predictions, chosen, min_group_size).members
        if members.sum() >= min_group_size
    ]
    if not judged:
        return None, False, "no group is large enough"
    tests = [
        binomtest(int(of_group.sum()), len(of_group), limit, alternative="less").pvalue
        if limit <= 1
        else 0.0  # chance does not explain what no model can reach
        for *_, of_group in judged
    ]
    lowest = min(judged, key=lambda one: one[:2])
    notes = [f"{lowest[1]}, {len(lowest[2])} images"]
    adjusted = holm([float(p) for p in tests])
    below = [one for one, p in zip(judged, adjusted, strict=True) if p < settings.significance]
    # The lowest may be a small group that chance explains, and another one decides.
    if below and lowest[1] not in [name for _, name, _ in below]:
        share, name, of_group = min(below, key=lambda one: one[:2])
        notes.append(f"significant is {name} with {share:.4f}, {len(of_group)} images")
    return float(lowest[0]), not below, "; ".join(notes)


def _ece_noise(predictions: pd.DataFrame, resampling: Resampling) -> float:
    """Return an upper limit, with 95 % confidence, of what chance adds to the calibration error.

    The measured error is at most the true one plus the mean distance between the share of males in
    a bin and its expectation (triangle inequality). That distance is simulated from the bins' own
    shares, each moved towards one half by half a male and half a female image, so that a bin of one
    image does not count as certain (after Broecker and Smith, Increasing the Reliability of
    Reliability Diagrams, Weather and Forecasting 22, 2007).
    """
    probabilities = predictions["probability"].to_numpy(dtype=float)
    bins = bins_of(probabilities)
    sizes = np.bincount(bins, minlength=BINS)
    males = np.bincount(bins, weights=predictions["label"].to_numpy(dtype=float), minlength=BINS)
    shares = (males + 0.5) / (sizes + 1)
    drawn = resampling.generator().binomial(sizes, shares, size=(resampling.samples, BINS))
    noise = np.abs(drawn - sizes * shares).sum(axis=1) / len(bins)
    return float(np.quantile(noise, 0.95))
