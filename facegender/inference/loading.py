"""Load models from files, ready to compute."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from facegender.errors import UserError
from facegender.faces.detector import Detector
from facegender.faces.settings import FaceCrop
from facegender.inference.model_crop import read_crop
from facegender.inference.predictor import BATCH_SIZE, Predictor, checked
from facegender.runtime.output_capture import hide_native_notes

if TYPE_CHECKING:
    import keras


def keras_predictor(model: keras.Model, crop: FaceCrop | None = None) -> Predictor:
    """Return a Keras model as a predictor."""
    from facegender.model.saved_model import predict_arrays

    return Predictor(model.input_shape[1], lambda batch: predict_arrays(model, [batch]), crop)


def load_predictors(path: Path, images: int, *, trusted: bool) -> list[Predictor]:
    """Load a model file, once for each thread that is useful.

    Args:
        path: .tflite or .keras file.
        images: number of images to predict.
        trusted: whether the file is the repository's own. Any other .tflite file first runs in a
            child process, because it can crash the process that loads it.

    Raises:
        UserError: the file is missing, damaged, or another kind of model.
    """
    if path.suffix == ".tflite":
        from facegender.inference.litert import load_litert, probe_litert

        if not trusted:
            probe_litert(path)
        batches = math.ceil(images / BATCH_SIZE)
        return [load_litert(path) for _ in range(min(batches, os.cpu_count() or 1))]
    if path.suffix == ".keras":
        # Once, because TensorFlow uses all cores.
        return [_checked_keras_predictor(path)]
    raise UserError(f"The model {path.name} is neither a .tflite nor a .keras file.")


def _checked_keras_predictor(path: Path) -> Predictor:
    with hide_native_notes():
        from facegender.model.saved_model import load_model

    model = load_model(path)
    taken = [(*item.shape, item.dtype) for item in getattr(model, "inputs", None) or ()]
    given = getattr(model, "output_shape", None)
    match taken:
        case [(_, int(height), int(width), 3, "uint8")] if height == width and given == (None, 1):
            pass
        case _:
            raise UserError(
                f"This project did not save the model {path.name}: it takes {taken} and gives "
                f"{given}, where uint8 images (n, size, size, 3) and probabilities (n, 1) are "
                "expected. `dvc repro` trains the model, `dvc pull` fetches it from a remote."
            )
    plain = keras_predictor(model, read_crop(path))
    if plain.crop:
        # Before threads start: opening the first LiteRT model hides what other threads print.
        Detector()
    return replace(plain, predict=lambda batch: checked(plain.predict(batch), path.name))
