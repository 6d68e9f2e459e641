"""Measure the gate's false alarms and its power, by pairs of models that are simulated.

    python -m bench.gate_power

For each number of test images, at most 5 % of pairs of equally good models may fail. If the second
model is worse by the smallest drop of accuracy that the report prints, four in five must be found.
As with faces, an image is easy for both models or hard for both. docs/gate.md has the table.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from facegender.gate.evidence import smallest_drop
from facegender.gate.judge import judge
from facegender.gate.pairing import Results
from facegender.gate.verdict import Report
from facegender.params import Gate, load_params

SIZES = (36, 360, 1102, 10_000)
# Share of hard images, and how often a model is right on one of them and on another.
_HARD, _RIGHT_IF_HARD, _RIGHT_IF_EASY = 1 / 7, 0.645, 0.989
_MIN_GROUP_SIZE = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1000, help="pairs a cell (default: 1000)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="IMAGES")
    args = parser.parse_args()
    gate = load_params(Path("params.yaml")).gate
    rows = []
    for n in args.sizes:
        alarms, _ = simulate(gate, n, 0, args.pairs)
        drop = printed_drop(gate, n)
        found = ""
        if drop is not None:
            _, significant = simulate(gate, n, drop, args.pairs)
            found = f"{significant / args.pairs:.3f}"
        shown = "none" if drop is None else f"{drop:.4f}"
        rows.append([f"{n:,}", f"{alarms / args.pairs:.3f}", shown, found])
    headers = ["images", "equal models that fail", "smallest drop", "found significant"]
    print(tabulate(rows, headers, tablefmt="pipe", disable_numparse=True))


def printed_drop(gate: Gate, n: int) -> float | None:
    """Return the smallest drop of accuracy that the report prints for such models."""
    quick = gate.model_copy(update={"bootstrap_samples": 1, "floors": {}, "reference": None})
    evidence = _judge_pair(np.random.default_rng(0), quick, n, 0).evidence
    # Their true rate of disagreement, not that of one test set.
    gained = _expected(lambda right: right * (1 - right))
    return None if evidence is None else smallest_drop(gained, n, evidence.significance)


def _expected(share: Callable[[float], float]) -> float:
    """Return the mean over all images of a function of the chance to be right."""
    return _HARD * share(_RIGHT_IF_HARD) + (1 - _HARD) * share(_RIGHT_IF_EASY)


def simulate(gate: Gate, n: int, drop: float, pairs: int, seed: int = 20) -> tuple[int, int]:
    """Judge pairs of models, the second worse by `drop` in truth.

    Returns:
        The number that fail, and the number that lose accuracy significantly.
    """
    generator = np.random.default_rng(seed)
    quick = gate.model_copy(update={"bootstrap_samples": 1, "floors": {}, "reference": None})
    failed = significant = 0
    for _ in range(pairs):
        report = _judge_pair(generator, quick, n, drop)
        failed += report.exit_code == 1
        accuracy = report.comparisons[0]
        significant += (accuracy.difference or 0) < 0 and (accuracy.p or 0) < gate.significance
    return failed, significant


def _judge_pair(generator: np.random.Generator, gate: Gate, n: int, drop: float) -> Report:
    columns = {
        "age": generator.integers(20, 70, n),
        "country": generator.choice([f"country {number}" for number in range(8)], n),
    }
    labels = generator.integers(0, 2, n)
    chance = np.where(generator.random(n) < _HARD, _RIGHT_IF_HARD, _RIGHT_IF_EASY)
    old, new = generator.random(n) < chance, generator.random(n) < chance
    # The loss comes on top: images that both models would get right.
    new &= ~(old & (generator.random(n) < drop / _expected(lambda right: right**2)))
    candidate, baseline = (
        Results(name, {}, predictions(labels, right, columns), {})
        for name, right in (("candidate", new), ("baseline", old))
    )
    return judge(candidate, baseline, gate, min_group_size=_MIN_GROUP_SIZE)


def predictions(
    labels: np.ndarray, right: np.ndarray, columns: Mapping[str, Sequence[Any] | np.ndarray]
) -> pd.DataFrame:
    """Return confident predictions, right where `right` is true, with further columns."""
    guess = np.where(right, labels, 1 - labels)
    names = np.arange(len(labels)).astype(str)
    return pd.DataFrame(
        {
            "path": names,
            "label": labels,
            "probability": np.where(guess == 1, 0.97, 0.03),
            "predicted": guess,
            "sha256": names,
            **columns,
        }
    )


if __name__ == "__main__":
    main()
