"""Prediction: from image files or arrays to the probability of the label `male`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from facegender.images import InvalidImage, decode_image
from facegender.manifest import NAMES


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image; `error` is why it could not be read, else None."""

    image: str
    label: str | None
    probability: float | None
    error: str | None = None


def predict_arrays(model: keras.Model, batches: Iterable[np.ndarray]) -> np.ndarray:
    """Return P(male), or the logit if the model ends in it, for batches of decoded images.

    Args:
        model: a saved model, or one in training.
        batches: uint8 arrays of shape (n, size, size, 3).

    Returns:
        float64 of shape (total,).
    """
    # A compiled graph, without the set-up of `predict`, which is made anew for every call.
    outputs = [np.asarray(model.predict_on_batch(batch))[:, 0] for batch in batches]
    return np.concatenate(outputs).astype(np.float64) if outputs else np.empty(0)


def image_size(model: keras.Model) -> int:
    """Return the side, in pixels, of the images that a model takes."""
    return int(model.input_shape[1])


def predict_images(
    model: keras.Model,
    sources: Sequence[tuple[str, bytes | Path]],
    *,
    threshold: float = 0.5,
    batch_size: int = 32,
) -> Iterable[Prediction]:
    """Yield a prediction for each named image, in order; bad images yield their reason.

    Args:
        model: a saved model.
        sources: a name, and the bytes or the path of an image.
        threshold: P(male) from which the label is `male`.
        batch_size: images decoded and predicted at a time.
    """
    size = image_size(model)
    for start in range(0, len(sources), batch_size):
        chunk = sources[start : start + batch_size]
        decoded = [_decode(source, size) for _, source in chunk]
        good = [item for item in decoded if isinstance(item, np.ndarray)]
        probabilities = iter(predict_arrays(model, [np.stack(good)]) if good else [])
        for (name, _), item in zip(chunk, decoded, strict=True):
            if isinstance(item, str):
                yield Prediction(name, None, None, item)
            else:
                probability = float(next(probabilities))
                yield Prediction(name, NAMES[int(probability >= threshold)], probability)


def _decode(source: bytes | Path, size: int) -> np.ndarray | str:
    try:
        return decode_image(source, size)
    except InvalidImage as error:
        return str(error)
