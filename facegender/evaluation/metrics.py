"""How good the predictions of a split are.

`METRICS` is the one list of metrics: evaluation, gate, report and model card all read it, so a new
metric is a new entry there. Throughout, `labels` are int (n,) with 0 female and 1 male, and
`probabilities` float (n,) of the label male. Male is the positive class of precision, recall and
F1, as in the study.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import norm
from sklearn import metrics as sklearn_metrics

from facegender.labels import LABELS, NAMES

BINS = 15
_Z = float(norm.ppf(0.975))


@dataclass(frozen=True)
class Metric:
    """A metric of a split.

    Attributes:
        name: its key in the test metrics.
        title: its name in the report and the model card.
        meaning: one phrase on what it measures.
        higher_is_better: its direction.
        compute: function of labels, probabilities and predicted labels; None if undefined.
        tile: whether the report shows it large, at the top.
        shown: whether the report and the card list it.
        in_gate: whether the gate compares it with the baseline. Accuracy and the recalls are
            always compared: they can fail the gate.
    """

    name: str
    title: str
    meaning: str
    higher_is_better: bool
    compute: Callable[[np.ndarray, np.ndarray, np.ndarray], float | None]
    tile: bool = False
    shown: bool = True
    in_gate: bool = False


def _recall_of(label: int) -> Callable[[np.ndarray, np.ndarray, np.ndarray], float | None]:
    def compute(labels: np.ndarray, _: np.ndarray, predicted: np.ndarray) -> float | None:
        of_class = predicted[labels == label]
        return float((of_class == label).mean()) if len(of_class) else None

    return compute


def _if_both_classes(
    score: Callable[[np.ndarray, np.ndarray], float],
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], float | None]:
    return lambda labels, probabilities, _: (
        float(score(labels, probabilities)) if len(np.unique(labels)) == 2 else None
    )


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean gap between P(male) and the share of males over equal bins, by their size.

    Naeini, Cooper and Hauskrecht, Obtaining Well Calibrated Probabilities Using Bayesian
    Binning, AAAI 2015, in its binary form.
    """
    # A bin's gap times its size is the sum of P - label in it.
    gaps = np.bincount(bins_of(probabilities), weights=probabilities - labels)
    return float(np.abs(gaps).sum() / len(labels))


def bins_of(probabilities: np.ndarray) -> np.ndarray:
    """Return the index of the bin, of BINS equal ones, of each probability: int (n,)."""
    return np.minimum((probabilities * BINS).astype(int), BINS - 1)


# In the order of metrics/test.json.
_METRICS = (
    Metric(
        "loss",
        "Loss",
        "mean negative log likelihood",
        False,
        lambda y, p, _: float(sklearn_metrics.log_loss(y, p, labels=[0, 1])),
        in_gate=True,
    ),
    Metric(
        "accuracy",
        "Accuracy",
        "share of images with the right label",
        True,
        lambda y, _, guess: float(sklearn_metrics.accuracy_score(y, guess)),
        tile=True,
    ),
    Metric(
        "precision",
        "Precision, male",
        "share labelled male of the images called male",
        True,
        lambda y, _, guess: float(sklearn_metrics.precision_score(y, guess, zero_division=0)),
    ),
    # The recall of male, under its usual name.
    Metric(
        "recall",
        "Recall",
        "recall of male",
        True,
        lambda y, _, guess: float(sklearn_metrics.recall_score(y, guess, zero_division=0)),
        shown=False,
    ),
    Metric(
        "f1",
        "F1",
        "harmonic mean of the precision and recall of male",
        True,
        lambda y, _, guess: float(sklearn_metrics.f1_score(y, guess, zero_division=0)),
        tile=True,
        in_gate=True,
    ),
    *(
        Metric(
            f"recall_{name}",
            f"Recall, {name}",
            f"share called {name} of the images labelled {name}",
            True,
            _recall_of(value),
            tile=True,
        )
        for name, value in LABELS.items()
    ),
    Metric(
        "roc_auc",
        "ROC AUC",
        "chance that a random male image has a higher P(male) than a random female one",
        True,
        _if_both_classes(sklearn_metrics.roc_auc_score),
        tile=True,
        in_gate=True,
    ),
    Metric(
        "average_precision",
        "Average precision",
        "area under the precision-recall curve of male",
        True,
        _if_both_classes(sklearn_metrics.average_precision_score),
    ),
    Metric(
        "brier",
        "Brier score",
        "mean squared error of P(male)",
        False,
        lambda y, p, _: float(sklearn_metrics.brier_score_loss(y, p)),
    ),
    Metric(
        "ece",
        "Calibration error",
        "ECE: mean gap between P(male) and the share labelled male",
        False,
        lambda y, p, _: expected_calibration_error(y, p),
        tile=True,
        in_gate=True,
    ),
)
METRICS = {metric.name: metric for metric in _METRICS}


def shown_metrics() -> list[Metric]:
    """Return the metrics of the report in its order: overall ones, other shares, then errors."""
    return sorted(
        (metric for metric in METRICS.values() if metric.shown),
        key=lambda metric: (metric.name not in ("accuracy", "f1"), not metric.higher_is_better),
    )


def classification_metrics(
    labels: np.ndarray, probabilities: np.ndarray, *, threshold: float
) -> dict[str, Any]:
    """Return every metric of a split, ready for JSON.

    Args:
        threshold: P(male) from which the prediction is male.

    Returns:
        `n`, a value for each of METRICS, `accuracy_ci` and `f1_ci` (low, high), and `confusion`
        (counts by label and prediction). An undefined metric is None.

    Raises:
        ValueError: there are no images, or a probability is not a number in [0, 1].
    """
    _check(labels, probabilities)
    predicted = (probabilities >= threshold).astype(int)
    confusion = sklearn_metrics.confusion_matrix(labels, predicted, labels=[0, 1])
    accuracy = wilson_interval(int(np.trace(confusion)), len(labels))
    f1 = f1_interval(confusion)
    return {
        "n": len(labels),
        **{
            name: metric.compute(labels, probabilities, predicted)
            for name, metric in METRICS.items()
        },
        "accuracy_ci": dict(zip(("low", "high"), accuracy, strict=True)),
        "f1_ci": dict(zip(("low", "high"), f1, strict=True)),
        "confusion": {
            f"{NAMES[label]}_as_{NAMES[guess]}": int(confusion[label, guess])
            for label in NAMES
            for guess in NAMES
        },
    }


def _check(labels: np.ndarray, probabilities: np.ndarray) -> None:
    if len(labels) == 0 or len(labels) != len(probabilities):
        raise ValueError(f"{len(labels)} labels and {len(probabilities)} probabilities")
    if not np.isin(labels, list(NAMES)).all():
        raise ValueError(f"labels must be in {list(NAMES)}, not {np.unique(labels)}")
    # NaN fails both comparisons.
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("a probability is not a number from 0 to 1")


def wilson_interval(right: float, n: float) -> tuple[float, float]:
    """Return the 95 % interval of a share of `n`; NaN twice if `n` is 0.

    Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 1927. Unlike
    the normal approximation it holds for few images and for shares near 1.
    """
    if n == 0:
        return math.nan, math.nan
    # SciPy's takes hundreds of times as long, because it computes a p-value first.
    share, z2 = right / n, _Z**2
    centre = (2 * n * share + z2) / (2 * (n + z2))
    reach = _Z / (2 * (n + z2)) * math.sqrt(4 * n * share * (1 - share) + z2)
    return (0.0 if right == 0 else centre - reach, 1.0 if right == n else centre + reach)


def paired_interval(gained: float, lost: float, n: float) -> tuple[float, float]:
    """Return the 95 % score interval of the difference, new minus old, of two shares of n images.

    Tango, Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design, Statistics in Medicine 17, 1998: the differences that a score test does
    not reject. A bootstrap would be too narrow for few images, and has no width when the models
    agree on all of them.

    Args:
        gained: images that only the new predictions get right.
        lost: images that only the old predictions get right.
    """
    observed = (gained - lost) / n

    def score(difference: float) -> float:
        variance = score_variance(difference, gained / n, lost / n) / n
        return (observed - difference) / math.sqrt(max(variance, 1e-300))

    def bound(sign: int) -> float:
        if observed == sign:
            return float(sign)
        nearly = sign * (1 - 1e-12)
        return float(brentq(lambda value: score(value) + sign * _Z, observed, nearly))

    return bound(-1), bound(1)


def score_variance(difference: float, gained: float, lost: float) -> float:
    """Return the variance, times n, of a paired difference if its true value were `difference`.

    Args:
        difference: true difference of the two shares.
        gained: share of images that only the new predictions get right.
        lost: share of images that only the old predictions get right.
    """
    b = (2 - gained + lost) * difference - gained - lost
    c = -lost * difference * (1 - difference)
    share_lost = (math.sqrt(max(0, b * b - 8 * c)) - b) / 4
    return 2 * share_lost + difference * (1 - difference)


def f1_interval(confusion: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of F1; from 0 to 1 if no image is male or called male.

    Of the images that are male or called male, a share J is both, and F1 is 2 J / (1 + J), which
    grows with J: its interval follows from Wilson's for J. A percentile bootstrap covers 0.81 at 36
    images (`python -m bench.interval_coverage --bootstrap`).

    Args:
        confusion: counts (2, 2), rows by label, columns by prediction.
    """
    either = int(confusion.sum() - confusion[0, 0])
    if either == 0:
        return 0.0, 1.0
    low, high = (2 * end / (1 + end) for end in wilson_interval(int(confusion[1, 1]), either))
    return low, high


def reliability_table(labels: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
    """Return mean P(male) and share of males in each non-empty bin of BINS equal ones.

    Returns:
        Columns `probability` (mean in the bin), `fraction_male` and `count`.
    """
    frame = pd.DataFrame(
        {"bin": bins_of(probabilities), "probability": probabilities, "fraction_male": labels}
    )
    table = frame.groupby("bin").agg(
        probability=("probability", "mean"),
        fraction_male=("fraction_male", "mean"),
        count=("bin", "size"),
    )
    return table.reset_index(drop=True)


def roc_table(labels: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
    """Return the ROC curve as columns `fpr` and `tpr`; empty if a class is missing."""
    if len(np.unique(labels)) < 2:
        return pd.DataFrame({"fpr": [], "tpr": []})
    fpr, tpr, _ = sklearn_metrics.roc_curve(labels, probabilities)
    return pd.DataFrame({"fpr": fpr, "tpr": tpr})


def precision_recall_table(labels: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
    """Return the precision-recall curve as columns `recall` and `precision`, or empty."""
    if len(np.unique(labels)) < 2:
        return pd.DataFrame({"recall": [], "precision": []})
    precision, recall, _ = sklearn_metrics.precision_recall_curve(
        labels, probabilities, drop_intermediate=True
    )
    return pd.DataFrame({"recall": recall, "precision": precision})
