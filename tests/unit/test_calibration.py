import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import bernoulli, norm

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


def test_the_fit_is_the_most_probable_one() -> None:
    labels, logits = labelled(30, 2.0, 0.7)
    deviations = (0.3, 2.0)

    def improbability(point: np.ndarray) -> float:
        male = expit(np.exp(point[0]) * logits + point[1])
        return -bernoulli.logpmf(labels, male).sum() - norm.logpdf(point, 0, deviations).sum()

    expected = minimize(improbability, (0, 0), method="Nelder-Mead", options={"xatol": 1e-8}).x
    slope, intercept = fit_calibration(
        labels, logits, log_slope_sd=deviations[0], intercept_sd=deviations[1]
    )
    assert (np.log(slope), intercept) == pytest.approx(tuple(expected), abs=1e-4)


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
def test_a_few_images_that_are_all_right_change_little(size: float) -> None:
    labels = np.array([0, 1] * 5)
    slope, intercept = fit_calibration(labels, np.where(labels == 1, size, -size))
    assert 1 <= slope < 1.6
    assert intercept == pytest.approx(0)


def test_a_few_images_are_better_than_none_and_many_are_better_still() -> None:
    """The expected loss falls with the number of images, for logits that are off."""
    labels, logits = labelled(60_000, 0.6, 0.5)
    unseen_labels, unseen = labels[-10_000:], logits[-10_000:]

    def loss(slope: float, intercept: float) -> float:
        male = slope * unseen + intercept
        return float((np.logaddexp(0, male) - unseen_labels * male).mean())

    losses = [loss(1, 0)]
    for n in (10, 30, 100, 1000):
        fits = [
            fit_calibration(labels[start : start + n], logits[start : start + n])
            for start in range(0, 40 * n, n)
        ]
        losses.append(float(np.mean([loss(*fit) for fit in fits])))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(loss(1 / 0.6, -0.5 / 0.6), abs=0.002)


def test_logits_that_rank_no_better_than_chance_turn_no_label_round() -> None:
    labels = np.array([0, 1, 1, 1] * 25)
    slope, intercept = fit_calibration(labels, 1000 - 4.0 * labels)
    assert 0 < slope < 0.01
    assert expit(slope * 997 + intercept) == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("labels", [[], [1, 1, 1]])
def test_without_both_labels_nothing_changes(labels: list[int]) -> None:
    assert fit_calibration(np.array(labels, int), np.ones(len(labels))) == (1.0, 0.0)
