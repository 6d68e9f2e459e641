"""The gate's claims about the power of a test set hold for simulated pairs of models."""

import numpy as np
import pytest
from scipy.stats import binomtest

from facegender.gate.evidence import POWER, Evidence, images_needed, power, smallest_drop

LEVEL = 0.05 / 3


@pytest.mark.parametrize(("n", "gained"), [(36, 0.0), (36, 0.03), (360, 0.02), (1102, 0.03)])
def test_the_smallest_drop_is_found_as_often_as_it_says(n: int, gained: float) -> None:
    drop = smallest_drop(gained, n, LEVEL)
    assert drop is not None
    rates = [gained, gained + drop, 1 - 2 * gained - drop]
    draws = np.random.default_rng(7).multinomial(n, rates, size=4000)[:, :2]
    tables, counts = np.unique(draws, axis=0, return_counts=True)
    found = sum(
        count
        for (won, lost), count in zip(tables.tolist(), counts.tolist(), strict=True)
        if lost > won and binomtest(lost, won + lost).pvalue < LEVEL
    )
    assert found / len(draws) == pytest.approx(POWER, abs=0.025)


def test_thirty_six_images_show_only_a_large_drop() -> None:
    # Seven losses and no gain: 2 * 0.5^7 is below the level, six are not.
    assert power(7 / 36, 0, 36, LEVEL) < POWER < power(10 / 36, 0, 36, LEVEL)
    assert 0.2 < (smallest_drop(0, 36, LEVEL) or 0) < 0.27
    assert smallest_drop(0, 6, LEVEL) is None
    assert smallest_drop(0.5, 36, LEVEL) is None
    assert power(0, 0, 36, LEVEL) == 0


@pytest.mark.parametrize(("drop", "gained"), [(0.01, 0.02), (0.05, 0.0), (0.05, 0.03)])
def test_as_many_images_as_it_names_would_do(drop: float, gained: float) -> None:
    n = images_needed(drop, gained, LEVEL)
    assert n is not None
    assert power(drop, gained, n, LEVEL) >= POWER
    assert power(drop, gained, int(0.95 * n), LEVEL) < POWER
    assert images_needed(1e-6, gained + 0.01, LEVEL) is None


def test_what_the_images_can_detect_is_said() -> None:
    drop = smallest_drop(0, 36, LEVEL)
    assert drop is not None
    enough = Evidence(36, 0, LEVEL, tolerance=drop)
    assert enough.enough
    assert enough.sentence == (
        f"36 images can detect a drop of accuracy of {drop:.4f} (power 80 %)"
    )
    few = Evidence(36, 0, LEVEL, tolerance=0.05)
    assert not few.enough
    assert few.sentence == (
        f"36 images cannot detect a drop of accuracy below {drop:.4f} (power 80 %); the tolerance "
        f"is 0.05, which takes {images_needed(0.05, 0, LEVEL):,} images"
    )
    assert few.to_json() == {
        "n": 36,
        "smallest_drop": drop,
        "power": 0.8,
        "tolerance": 0.05,
        "images_needed": few.images_needed,
    }
    assert Evidence(6, 0, LEVEL, tolerance=0).sentence == (
        "6 images cannot detect any drop of accuracy (power 80 %); the tolerance is 0"
    )
