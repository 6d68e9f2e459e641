"""Metrics of a split, against what others compute."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve

from facegender.evaluation.metrics import (
    BINS,
    METRICS,
    classification_metrics,
    expected_calibration_error,
    precision_recall_table,
    reliability_table,
    roc_table,
    shown_metrics,
    wilson_interval,
)


def predictions() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(4)
    probabilities = generator.random(500)
    return (generator.random(500) < probabilities**2).astype(int), probabilities


def test_the_reliability_table_is_scikit_learns() -> None:
    labels, probabilities = predictions()
    table = reliability_table(labels, probabilities)
    fraction, mean = calibration_curve(labels, probabilities, n_bins=BINS)
    assert table["fraction_male"].to_numpy() == pytest.approx(fraction)
    assert table["probability"].to_numpy() == pytest.approx(mean)
    assert table["count"].sum() == len(labels)
    gaps = (table["probability"] - table["fraction_male"]).abs() * table["count"]
    error = expected_calibration_error(labels, probabilities)
    assert error == pytest.approx(gaps.sum() / len(labels))


@pytest.mark.parametrize(
    ("right", "n"), [(0, 1), (1, 1), (0, 36), (12, 36), (16, 16), (1101, 1102)]
)
def test_wilsons_interval_is_scipys(right: int, n: int) -> None:
    expected = binomtest(right, n).proportion_ci(method="wilson")
    low, high = wilson_interval(right, n)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-15)
    assert (low == 0, high == 1) == (right == 0, right == n)


def test_the_curves_of_four_images() -> None:
    labels, probabilities = np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.6, 0.9])
    roc = roc_table(labels, probabilities)
    assert roc.to_numpy().tolist() == [[0, 0], [0, 0.5], [0.5, 0.5], [0.5, 1], [1, 1]]
    curve = precision_recall_table(labels, probabilities).round(4).to_numpy().tolist()
    assert curve == [[1, 0.5], [1, 0.6667], [0.5, 0.5], [0.5, 1], [0, 1]]
    alone = np.ones(4, int)
    assert roc_table(alone, probabilities).to_dict("list") == {"fpr": [], "tpr": []}
    empty = precision_recall_table(alone, probabilities).to_dict("list")
    assert empty == {"recall": [], "precision": []}


def test_the_metrics_of_four_images() -> None:
    labels, probabilities = np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.6, 0.9])
    found = classification_metrics(labels, probabilities, threshold=0.35)  # one female called male
    assert {name: found[name] for name in ("n", *METRICS)} == pytest.approx(
        {
            "n": 4,
            "loss": -np.log([0.9, 0.4, 0.4, 0.9]).mean(),
            "accuracy": 3 / 4,
            "precision": 2 / 3,
            "recall": 1,
            "f1": 4 / 5,
            "recall_female": 1 / 2,
            "recall_male": 1,
            "roc_auc": 3 / 4,
            "average_precision": (1 + 2 / 3) / 2,
            "brier": (0.01 + 0.36 + 0.36 + 0.01) / 4,
            "ece": (0.1 + 0.6 + 0.6 + 0.1) / 4,
        }
    )
    counts = {"female_as_female": 1, "female_as_male": 1, "male_as_female": 0, "male_as_male": 2}
    assert found["confusion"] == counts
    # Two of the three that are male or called male are both: F1 is 2 J / (1 + J).
    low, high = (2 * end / (1 + end) for end in wilson_interval(2, 3))
    assert found["f1_ci"] == pytest.approx({"low": low, "high": high})


def test_what_one_class_leaves_undefined() -> None:
    found = classification_metrics(np.zeros(4, int), np.full(4, 0.2), threshold=0.5)
    undefined = {"recall_male", "roc_auc", "average_precision"}
    assert {name for name in METRICS if found[name] is None} == undefined
    assert (found["precision"], found["recall"], found["f1"]) == (0, 0, 0)
    assert found["loss"] == pytest.approx(-np.log(0.8))
    assert found["f1_ci"] == {"low": 0, "high": 1}


def test_metrics_are_those_of_the_table() -> None:
    labels, probabilities = predictions()
    found = classification_metrics(labels, probabilities, threshold=0.5)
    assert set(found) == {"n", *METRICS, "accuracy_ci", "f1_ci", "confusion"}
    names = [metric.name for metric in shown_metrics()]
    assert names[:2] == ["accuracy", "f1"]
    assert set(names) == set(METRICS) - {"recall"}
    tiles = [metric.name for metric in shown_metrics() if metric.tile]
    assert tiles == ["accuracy", "f1", "recall_female", "recall_male", "roc_auc", "ece"]
    # A direction that is wrong would turn a verdict round.
    better = classification_metrics(labels, 0.9 * labels + 0.1 * probabilities, threshold=0.5)
    for name, metric in METRICS.items():
        assert (better[name] > found[name]) == metric.higher_is_better, name


def test_accuracy_of_one_has_an_interval_with_a_width() -> None:
    labels = np.arange(36) % 2
    # A probability that equals the threshold is male.
    found = classification_metrics(labels, labels * 1.0, threshold=1.0)
    assert found["accuracy_ci"] == {"low": pytest.approx(0.9036, abs=1e-4), "high": 1}


@pytest.mark.parametrize(
    ("labels", "probabilities", "says"),
    [
        ([], [], "0 labels and 0 probabilities"),
        ([0, 1], [0.5], "2 labels and 1 probabilities"),
        ([0, 2], [0.5, 0.5], "labels must be in"),
        *(([0, 1], [0.5, one], "not a number from 0 to 1") for one in (-0.1, 1.1, np.nan)),
    ],
)
def test_what_are_no_predictions_has_no_metrics(
    labels: list, probabilities: list, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        classification_metrics(np.array(labels, int), np.array(probabilities), threshold=0.5)
