"""The interface of a loaded model, and the label for a probability."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from facegender.errors import UserError
from facegender.faces.settings import FaceCrop
from facegender.labels import NAMES

UNCERTAIN = "uncertain"
NO_FACE = "no face"
# Small, so that the outputs of a layer stay in a core's cache.
BATCH_SIZE = 4


@dataclass(frozen=True)
class Predictor:
    """A loaded model of any runtime.

    Attributes:
        size: side, in pixels, of the images it takes.
        predict: function from uint8 (n, size, size, 3) to P(male), float64 (n,); not thread-safe.
        crop: how faces are cut out of a picture; None if it judges whole pictures.
    """

    size: int
    predict: Callable[[np.ndarray], np.ndarray]
    crop: FaceCrop | None = None

    def predict_all(
        self, images: Sequence[np.ndarray], batch_size: int = BATCH_SIZE
    ) -> Iterator[float]:
        """Yield P(male) of images, uint8 (size, size, 3), stacked a few at a time."""
        for start in range(0, len(images), batch_size):
            yield from map(float, self.predict(np.stack(images[start : start + batch_size])))


def checked(probabilities: np.ndarray, name: str) -> np.ndarray:
    """Return a model's output if it consists of probabilities.

    Args:
        probabilities: output of the model, float64 (n,).
        name: file name of the model.

    Raises:
        UserError: it does not, so another project exported the model, or training failed.
    """
    # Written so that NaN fails too.
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise UserError(
            f"The model {name} gives {probabilities.min():g} to {probabilities.max():g}, where "
            "probabilities from 0 to 1 are expected: this project did not export it, or its "
            "training failed. `dvc repro` builds the model, `dvc pull` fetches it from a remote."
        )
    return probabilities


def label_of(probability: float, *, threshold: float, abstain_below: float) -> str:
    """Return the label of an image.

    Args:
        threshold: lowest P(male) that is labelled `male`.
        abstain_below: labels less probable than this become `uncertain`; 0 never abstains.
    """
    label = int(probability >= threshold)
    return UNCERTAIN if confidence(probability, label) < abstain_below else NAMES[label]


def confidence(probability: float, label: int) -> float:
    """Return the probability of a label, from P(male); below 0.5 if the threshold decided."""
    return probability if label == 1 else 1 - probability
