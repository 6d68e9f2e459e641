import numpy as np
import pytest

from facegender.evaluation.metrics import expected_calibration_error
from facegender.training.calibration import fit_temperature


def labelled(n: int, overconfidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from known probabilities, and logits that overstate them."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, n)
    labels = (generator.random(n) < 1 / (1 + np.exp(-logits))).astype(int)
    return labels, logits * overconfidence


@pytest.mark.parametrize("overconfidence", [0.5, 1.0, 3.0])
def test_it_finds_how_much_the_logits_overstate(overconfidence: float) -> None:
    labels, logits = labelled(20_000, overconfidence)
    assert fit_temperature(labels, logits) == pytest.approx(overconfidence, rel=0.05)


def test_it_mends_calibration_and_changes_no_decision() -> None:
    labels, logits = labelled(2_000, 4.0)
    temperature = fit_temperature(labels[:1000], logits[:1000])
    before, after = (1 / (1 + np.exp(-logits[1000:] / t)) for t in (1.0, temperature))
    assert ((before >= 0.5) == (after >= 0.5)).all()
    errors = [expected_calibration_error(labels[1000:], p) for p in (before, after)]
    assert errors[1] < errors[0] / 2


def test_a_few_images_that_are_all_right_do_not_ask_for_certainty() -> None:
    labels = np.array([0, 1] * 5)
    logits = np.where(labels == 1, 2.0, -2.0)
    assert 1 / (1 + np.exp(-2.0 / fit_temperature(labels, logits))) == pytest.approx(
        6 / 7, abs=1e-3
    )


def test_no_image_changes_nothing() -> None:
    assert fit_temperature(np.array([], int), np.array([])) == 1.0
