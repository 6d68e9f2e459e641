"""Every interval that the project prints covers as it claims: the bench in short."""

import math

from bench.interval_coverage import coverages


def test_every_interval_covers_as_it_claims() -> None:
    found = coverages((36, 360), draws=1000, seed=1)
    assert len(found) == 9
    # Two standard errors beyond 0.93 to 0.97, which `python -m bench.interval_coverage` shows.
    assert all(
        0.916 <= value <= 0.984
        for values in found.values()
        for value in values
        if not math.isnan(value)
    ), found
