"""The interface of a loaded model, and the label for a probability."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from facegender.faces.crop import FaceCrop
from facegender.labels import NAMES

UNCERTAIN = "uncertain"
NO_FACE = "no face"
# Images predicted at a time. Small, so that the outputs of a layer stay in a core's cache.
BATCH_SIZE = 4


@dataclass(frozen=True)
class Predictor:
    """A loaded model, whatever runtime it uses.

    Attributes:
        size: side, in pixels, of the images it takes.
        predict: function from uint8 (n, size, size, 3) to P(male), float64 (n,); not thread-safe.
        crop: how faces are cut out of a picture; None if it judges whole pictures.
    """

    size: int
    predict: Callable[[np.ndarray], np.ndarray]
    crop: FaceCrop | None = None


def label_of(probability: float, *, threshold: float, abstain_below: float) -> str:
    """Return the label of an image.

    Args:
        probability: P(male).
        threshold: lowest P(male) that is labelled `male`.
        abstain_below: lowest probability of the likelier label that is not `uncertain`; 0.5 never
            abstains.
    """
    if max(probability, 1 - probability) < abstain_below:
        return UNCERTAIN
    return NAMES[int(probability >= threshold)]
