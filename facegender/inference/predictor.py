"""A model that is ready to compute, whatever runs it, and the label of what it computes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from facegender.labels import NAMES

UNCERTAIN = "uncertain"


@dataclass(frozen=True)
class Predictor:
    """A model that is ready to compute, whatever runs it.

    Attributes:
        size: side, in pixels, of the images it takes.
        predict: from uint8 (n, size, size, 3) to P(male), float64 (n,). Not for use by several
            threads at once.
    """

    size: int
    predict: Callable[[np.ndarray], np.ndarray]


def label_of(probability: float, *, threshold: float, abstain_below: float) -> str:
    """Return the label of an image.

    Args:
        probability: P(male).
        threshold: P(male) from which the label is `male`.
        abstain_below: the label is `uncertain` when the likelier label has a lower probability
            than this; 0.5 never abstains.
    """
    if max(probability, 1 - probability) < abstain_below:
        return UNCERTAIN
    return NAMES[int(probability >= threshold)]
