"""The evidence of a test set: the smallest drop that the gate would find significant.

Throughout, `gained` is the share of images that only the candidate gets right, `n` the number of
images in the test set, and `significance` the level of McNemar's test, two-sided.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, norm

from facegender.evaluation.metrics import score_variance

POWER = 0.8
# More images than anyone labels for a test set.
_MAX_IMAGES = 2**24


def power(drop: float, gained: float, n: int, significance: float) -> float:
    """Return the probability that the test finds a true drop of the accuracy significant."""
    differing = min(1.0, 2 * gained + drop)
    if differing == 0:
        return 0.0
    # The sum over the number of differing images leaves out a probability of 1e-9.
    low, high = (int(bound) for bound in binom.ppf((5e-10, 1 - 5e-10), n, differing))
    counts = np.arange(low, high + 1)
    # The smallest number of losses whose upper tail is below half the level.
    critical = binom.isf(significance / 2, counts, 0.5) + 1
    found = binom.sf(critical - 1, counts, min(1.0, (gained + drop) / differing))
    return float((binom.pmf(counts, n, differing) * found).sum())


def smallest_drop(gained: float, n: int, significance: float) -> float | None:
    """Return the smallest drop found with probability POWER; None if no drop is."""

    def lacking(drop: float) -> float:
        return power(drop, gained, n, significance) - POWER

    largest = 1 - 2 * gained
    if largest <= 0 or lacking(largest) < 0:
        return None
    return float(brentq(lacking, 0, largest, xtol=1e-6))


def images_needed(drop: float, gained: float, significance: float) -> int | None:
    """Return about how many images detect a true drop, above 0, with POWER; None if too many."""
    n = 1
    while power(drop, gained, n, significance) < POWER:
        n *= 2
        if n > _MAX_IMAGES:
            return None
    low, high = n // 2, n
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        enough = power(drop, gained, middle, significance) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high


def images_for_noninferiority(tolerance: float, differing: float) -> int | None:
    """Return about how many images show, with probability POWER, that equal models are no worse.

    Args:
        tolerance: drop that the 95 % interval must exclude; no number of images shows 0.
        differing: share of images that exactly one of the models gets right.
    """
    if tolerance == 0:
        return None
    # The variance if the true difference is the tolerance; if it is 0, the variance is `differing`.
    at_tolerance = score_variance(-tolerance, differing / 2, differing / 2)
    reach = norm.ppf(0.975) * math.sqrt(at_tolerance) + norm.ppf(POWER) * math.sqrt(differing)
    return math.ceil((reach / tolerance) ** 2)


@dataclass(frozen=True)
class Evidence:
    """What drop of the accuracy a test set can detect; computed on demand.

    Attributes:
        gained: share of images that each model alone would get right without a drop.
        tolerance: drop that the gate tolerates.
    """

    n: int
    gained: float
    significance: float
    tolerance: float

    @cached_property
    def smallest_drop(self) -> float | None:
        """The smallest drop that would be found; None if no drop would."""
        return smallest_drop(self.gained, self.n, self.significance)

    @cached_property
    def images_needed(self) -> int | None:
        """The number of images that can detect a drop of the tolerance; None if too many."""
        if self.tolerance == 0:
            return None
        return images_needed(self.tolerance, self.gained, self.significance)

    @property
    def enough(self) -> bool:
        """Whether a drop beyond the tolerance would be found."""
        return self.smallest_drop is not None and self.smallest_drop <= self.tolerance

    @property
    def sentence(self) -> str:
        """The finding in words."""
        drop = self.smallest_drop
        if self.enough:
            return f"{self.n} images can detect a drop of accuracy of {drop:.4f} (power 80 %)"
        hidden = "any drop of accuracy" if drop is None else f"a drop of accuracy below {drop:.4f}"
        needed = (
            "" if self.images_needed is None else f", which takes {self.images_needed:,} images"
        )
        tolerance = f"the tolerance is {self.tolerance:g}{needed}"
        return f"{self.n} images cannot detect {hidden} (power 80 %); {tolerance}"

    def to_json(self) -> dict[str, Any]:
        """Return the finding, ready for JSON."""
        return {
            "n": self.n,
            "smallest_drop": self.smallest_drop,
            "power": POWER,
            "tolerance": self.tolerance,
            "images_needed": self.images_needed,
        }
