"""Compare the priors of the calibration on networks that `bench.recipes` has trained.

Calibrates each network on images drawn from the fold that it was not trained on, and computes the
log loss on the rest of that fold. Prints the mean over draws and networks for each number of images
and each pair of priors, and those of no calibration and of scikit-learn's logistic regression (an
L2 penalty of 1 on standardised logits, the intercept free).

    python -m bench.calibration RESULTS
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import logit
from sklearn.linear_model import LogisticRegression

from facegender.data.processed import ProcessedSplit
from facegender.runtime.entry_points import run_command
from facegender.training.calibration import fit_calibration

Fit = Callable[[np.ndarray, np.ndarray], tuple[float, float]]

_PRIORS = [(slope, intercept) for slope in (0.3, 0.5, 0.7, 1.0) for intercept in (0.5, 1.0, 2.0)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="folder of bench.recipes --results")
    parser.add_argument("--images", type=int, nargs="+", default=[13, 30, 115, 250])
    parser.add_argument("--draws", type=int, default=30, help="per number of images (30)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (0)")
    args = parser.parse_args()
    networks = [judged(path.parent) for path in sorted(args.results.glob("*/done.json"))]
    print(f"{len(networks)} networks, {args.draws} draws of each: mean log loss by images")
    fits: dict[str, Fit] = {"none": lambda labels, logits: (1.0, 0.0), "scikit-learn": regression}
    for slope, intercept in _PRIORS:
        fits[f"{slope} and {intercept}"] = priors(slope, intercept)
    table = pd.DataFrame(
        {n: mean_losses(networks, fits, n, args.draws, args.seed) for n in args.images}
    )
    print(table.to_string(float_format="{:.4f}".format))


def judged(training: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and logits, before calibration, of the fold held out of a training."""
    from facegender.model.saved_model import load_model, predict_arrays

    done = pd.read_json(training / "done.json", typ="series")
    held_out = ProcessedSplit(training / "test")
    male = predict_arrays(load_model(training / "model.keras"), held_out.batches(32))
    logits = logit(np.clip(male.astype(np.float64), 1e-12, 1 - 1e-12))
    return held_out.labels, (logits - done["intercept"]) / done["slope"]


def priors(slope: float, intercept: float) -> Fit:
    return lambda labels, logits: fit_calibration(
        labels, logits, log_slope_sd=slope, intercept_sd=intercept
    )


def regression(labels: np.ndarray, logits: np.ndarray) -> tuple[float, float]:
    scale = logits.std()
    model = LogisticRegression().fit((logits / scale)[:, None], labels)
    return float(model.coef_[0, 0] / scale), float(model.intercept_[0])


def mean_losses(
    networks: list[tuple[np.ndarray, np.ndarray]],
    fits: dict[str, Fit],
    images: int,
    draws: int,
    seed: int,
) -> pd.Series:
    generator = np.random.default_rng(seed)
    losses: dict[str, list[float]] = {name: [] for name in fits}
    for labels, logits in networks:
        for _ in range(draws):
            order = generator.permutation(len(labels))
            drawn, rest = order[:images], order[images:]
            if labels[drawn].min() == labels[drawn].max():
                continue
            for name, fit in fits.items():
                slope, intercept = fit(labels[drawn], logits[drawn])
                male = slope * logits[rest] + intercept
                losses[name].append(float((np.logaddexp(0, male) - labels[rest] * male).mean()))
    return pd.Series({name: np.mean(values) for name, values in losses.items()})


if __name__ == "__main__":
    run_command(main)
