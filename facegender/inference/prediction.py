"""Predict the labels of image files. Importing this module does not load a runtime."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

import numpy as np

from facegender.data.face_images import box_of, face_images
from facegender.data.images import InvalidImage
from facegender.inference.predictor import BATCH_SIZE, NO_FACE, Predictor, label_of

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Prediction:
    """The prediction for one face of an image.

    Attributes:
        label: `female`, `male`, `uncertain` if asked to abstain, or `no face` if the model judges
            faces and the image has none; None with an error.
        probability: P(male); None without a face or with an error.
        error: why the image could not be read, or None.
        left: left edge of the face's box, in pixels of the upright image. It and the fields below
            are None if the image was judged whole.
        score: confidence of the face detector, from 0 to 1.
    """

    image: str
    label: str | None
    probability: float | None
    error: str | None = None
    left: float | None = None
    top: float | None = None
    width: float | None = None
    height: float | None = None
    score: float | None = None


def predict_images(
    predictors: Sequence[Predictor],
    sources: Sequence[tuple[str, bytes | Path]],
    *,
    threshold: float = 0.5,
    abstain_below: float = 0.0,
    batch_size: int = BATCH_SIZE,
    faces: Literal["all", "largest", "whole"] = "all",
) -> Iterator[list[Prediction]]:
    """Yield the predictions of each image, in order: one, or one for each face that is found.

    Each predictor has a thread, which decodes and predicts a batch at a time. At most two batches
    per predictor are ahead of the caller, so memory does not grow with the number of images.

    Args:
        predictors: the same model, once for each thread.
        sources: names, each with the bytes or the path of an image.
        faces: which faces of an image to judge, or to judge it whole.
    """
    idle: SimpleQueue[Predictor] = SimpleQueue()
    for predictor in predictors:
        idle.put(predictor)

    def work(batch: Sequence[tuple[str, bytes | Path]]) -> list[list[Prediction]]:
        predictor = idle.get()
        try:
            return _predict_batch(predictor, batch, threshold, abstain_below, faces)
        finally:
            idle.put(predictor)

    starts = range(0, len(sources), batch_size)
    batches = (sources[start : start + batch_size] for start in starts)
    for done in map_ahead(work, batches, threads=len(predictors), ahead=2 * len(predictors)):
        yield from done


def map_ahead(
    work: Callable[[_T], _R], items: Iterable[_T], *, threads: int, ahead: int
) -> Iterator[_R]:
    """Yield `work` of each item in order, computed in threads at most `ahead` of the caller."""
    left = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        futures = deque(pool.submit(work, item) for item in islice(left, ahead))
        while futures:
            done = futures.popleft().result()
            futures.extend(pool.submit(work, item) for item in islice(left, 1))
            yield done


def _predict_batch(
    predictor: Predictor,
    batch: Sequence[tuple[str, bytes | Path]],
    threshold: float,
    abstain_below: float,
    faces: str,
) -> list[list[Prediction]]:
    crop = None if faces == "whole" else predictor.crop
    by_image: list[list[Prediction]] = []
    pixels: list[np.ndarray] = []
    for name, source in batch:
        predictions: list[Prediction] = []
        by_image.append(predictions)
        try:
            found = face_images(source, predictor.size, crop)
        except InvalidImage as error:
            predictions.append(Prediction(name, None, None, str(error)))
            continue
        for face, image in found[:1] if faces == "largest" else found:
            if crop and not face:
                predictions.append(Prediction(name, NO_FACE, None))
                continue
            box: dict[str, Any] = box_of(face) if face else {}
            predictions.append(Prediction(name, None, None, **box))
            pixels.append(image)
    # In small batches, because an image may have hundreds of faces.
    probabilities = predictor.predict_all(pixels, len(batch))
    for predictions in by_image:
        for index, item in enumerate(predictions):
            if item.error is None and item.label is None:
                probability = next(probabilities)
                label = label_of(probability, threshold=threshold, abstain_below=abstain_below)
                predictions[index] = replace(item, label=label, probability=probability)
    return by_image
