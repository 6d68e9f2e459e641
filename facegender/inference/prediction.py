"""Predict the labels of image files. Importing this module does not load a runtime."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from facegender.data.images import InvalidImage, decode_image
from facegender.inference.predictor import Predictor, label_of

# Small, so that the outputs of a layer stay in a core's cache.
BATCH_SIZE = 4


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image, or the reason why it could not be read, in `error`.

    The label is `female`, `male`, or `uncertain` if the caller asked to abstain.
    """

    image: str
    label: str | None
    probability: float | None
    error: str | None = None


def predict_images(
    predictors: Sequence[Predictor],
    sources: Sequence[tuple[str, bytes | Path]],
    *,
    threshold: float = 0.5,
    abstain_below: float = 0.0,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Prediction]:
    """Yield a prediction for each image, in order.

    Each predictor has a thread, which decodes and predicts a batch at a time. At most two batches
    per predictor are ahead of the caller, so memory does not grow with the number of images.

    Args:
        predictors: the same model, once for each thread.
        sources: names, each with the bytes or the path of an image.
        threshold: same as in `label_of`.
        abstain_below: same as in `label_of`.
        batch_size: images in a batch.
    """
    idle: SimpleQueue[Predictor] = SimpleQueue()
    for predictor in predictors:
        idle.put(predictor)

    def work(batch: Sequence[tuple[str, bytes | Path]]) -> list[Prediction]:
        predictor = idle.get()
        try:
            return _predict_batch(predictor, batch, threshold, abstain_below)
        finally:
            idle.put(predictor)

    starts = range(0, len(sources), batch_size)
    batches = (sources[start : start + batch_size] for start in starts)
    with ThreadPoolExecutor(len(predictors)) as pool:
        ahead = deque(pool.submit(work, batch) for batch in islice(batches, 2 * len(predictors)))
        while ahead:
            done = ahead.popleft().result()
            ahead.extend(pool.submit(work, batch) for batch in islice(batches, 1))
            yield from done


def _predict_batch(
    predictor: Predictor,
    batch: Sequence[tuple[str, bytes | Path]],
    threshold: float,
    abstain_below: float,
) -> list[Prediction]:
    decoded = [_decode(source, predictor.size) for _, source in batch]
    good = [item for item in decoded if isinstance(item, np.ndarray)]
    probabilities = iter(predictor.predict(np.stack(good)) if good else [])
    predictions = []
    for (name, _), item in zip(batch, decoded, strict=True):
        if isinstance(item, str):
            predictions.append(Prediction(name, None, None, item))
            continue
        probability = float(next(probabilities))
        label = label_of(probability, threshold=threshold, abstain_below=abstain_below)
        predictions.append(Prediction(name, label, probability))
    return predictions


def _decode(source: bytes | Path, size: int) -> np.ndarray | str:
    try:
        return decode_image(source, size)
    except InvalidImage as error:
        return str(error)
