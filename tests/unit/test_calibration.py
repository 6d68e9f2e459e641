import numpy as np
import pytest
from scipy.special import expit

from facegender.evaluation.metrics import expected_calibration_error
from facegender.training.calibration import fit_calibration


def labelled(n: int, overconfidence: float, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from known probabilities, and logits that overstate and shift them."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, n)
    labels = (generator.random(n) < expit(logits)).astype(int)
    return labels, logits * overconfidence + shift


@pytest.mark.parametrize(
    ("overconfidence", "shift"), [(0.5, 0.0), (1.0, 2.0), (3.0, -2.0), (3.0, 9.0)]
)
def test_it_finds_how_much_the_logits_overstate_and_their_shift(
    overconfidence: float, shift: float
) -> None:
    slope, intercept = fit_calibration(*labelled(20_000, overconfidence, shift))
    assert slope == pytest.approx(1 / overconfidence, rel=0.05)
    assert intercept == pytest.approx(-shift / overconfidence, abs=0.1)


def test_it_mends_what_balanced_class_weights_shift() -> None:
    # One female in ten images: balanced weights train logits that are log 9 too low.
    generator = np.random.default_rng(0)
    true = generator.normal(np.log(9), 2, 4_000)
    labels = (generator.random(4_000) < expit(true)).astype(int)
    logits = true - np.log(9)
    slope, intercept = fit_calibration(labels[:2000], logits[:2000])
    before, after = (
        expected_calibration_error(labels[2000:], expit(a * logits[2000:] + b))
        for a, b in ((1, 0), (slope, intercept))
    )
    assert before > 0.1
    assert after < 0.03


@pytest.mark.parametrize("size", [0.2, 2.0, 100.0])
def test_a_few_images_that_are_all_right_do_not_ask_for_certainty(size: float) -> None:
    labels = np.array([0, 1] * 5)
    slope, intercept = fit_calibration(labels, np.where(labels == 1, size, -size))
    # As sure for small logits as for large ones, about as sure as ten of ten (11/12).
    assert expit(slope * size + intercept) == pytest.approx(11 / 12, abs=0.02)


def test_logits_that_rank_no_better_than_chance_turn_no_label_round() -> None:
    labels = np.array([0, 1, 1, 1] * 25)
    slope, intercept = fit_calibration(labels, 1000 - 4.0 * labels)
    assert slope == 0.01
    assert expit(slope * 997 + intercept) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("labels", [[], [1, 1, 1]])
def test_without_both_labels_nothing_changes(labels: list[int]) -> None:
    assert fit_calibration(np.array(labels, int), np.ones(len(labels))) == (1.0, 0.0)
