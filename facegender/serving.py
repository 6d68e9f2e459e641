"""The model as MLflow serves it; MLflow runs this file to load a logged model (no pickle).

It takes what a user has: the bytes of image files, their base64 text, or uint8 RGB arrays; one, a
list, an array of them, or a DataFrame with one column. It gives a DataFrame with a row an image:
`label` (female or male, as perceived) and `probability` (of the label male).
"""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel
from PIL import Image

from facegender.images import InvalidImage, decode_image
from facegender.labels import NAMES


class FaceGender(PythonModel):
    """A saved model behind MLflow's `pyfunc` interface."""

    def load_context(self, context: Any) -> None:
        """Load the Keras model of a logged model."""
        # Imported here, for TensorFlow takes seconds to import and logging needs none of it.
        from facegender.model import load_model

        self._model = load_model(Path(context.artifacts["model"]))
        self._threshold = float(context.model_config["threshold"])

    # No type hint for the input: MLflow would read one as a schema and refuse arrays.
    def predict(self, context: Any, model_input, params: Any = None) -> pd.DataFrame:  # type: ignore[no-untyped-def]  # noqa: ANN001
        """Return label and probability for each image.

        Raises:
            MlflowException: (a client error) an image cannot be read.
        """
        from facegender.prediction import image_size, predict_arrays

        size = image_size(self._model)
        images = [_to_array(item, size, place) for place, item in enumerate(_items(model_input))]
        batches = (np.stack(images[start : start + 32]) for start in range(0, len(images), 32))
        probabilities = predict_arrays(self._model, batches)
        labels = [NAMES[int(p >= self._threshold)] for p in probabilities]
        return pd.DataFrame({"label": labels, "probability": probabilities})


def _items(model_input: Any) -> list[Any]:
    """Return one item an image."""
    if isinstance(model_input, pd.DataFrame):
        if len(model_input.columns) != 1:
            raise MlflowException.invalid_parameter_value(
                f"One column of images is expected, not {list(model_input.columns)}."
            )
        return model_input.iloc[:, 0].tolist()
    if isinstance(model_input, Mapping):
        if len(model_input) != 1:
            raise MlflowException.invalid_parameter_value(
                f"One field of images is expected, not {list(model_input)}."
            )
        return _items(next(iter(model_input.values())))
    if isinstance(model_input, bytes | str):
        return [model_input]
    if isinstance(model_input, np.ndarray) and model_input.ndim == 3:
        return [model_input]
    return list(model_input)


def _to_array(item: Any, size: int, place: int) -> np.ndarray:
    """Return one image as uint8 (size, size, 3)."""
    try:
        if isinstance(item, str):
            item = base64.b64decode("".join(item.split()), validate=True)  # some encoders wrap
        if isinstance(item, bytes):
            return decode_image(item, size)
        array = np.asarray(item)
        if array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
            raise InvalidImage(f"an array of shape (height, width, 3) is expected: {array.shape}")
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
            raise InvalidImage("an array holds whole numbers from 0 to 255")
        pixels = array.astype(np.uint8)
        if pixels.shape[:2] != (size, size):
            resized = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
            pixels = np.asarray(resized)
        return pixels
    except (InvalidImage, binascii.Error, ValueError) as error:
        raise MlflowException.invalid_parameter_value(f"Image {place}: {error}") from None


mlflow.models.set_model(FaceGender())
