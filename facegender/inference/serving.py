"""The model as MLflow serves it. MLflow runs this file to load a logged model (no pickle).

Input: the bytes of image files, their base64 text, or uint8 RGB arrays; one image, a list or an
array of them, or a DataFrame with one column. Output: a DataFrame with a row for each image:
`label` (female or male, as perceived, or uncertain) and `probability` (of the label male).
"""

import base64
import binascii
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel
from PIL import Image

from facegender.data.images import InvalidImage, decode_image
from facegender.errors import UserError
from facegender.inference.litert import load_litert
from facegender.inference.predictor import label_of

# Images predicted at a time. Only the memory for the layers' outputs grows with it.
_BATCH_SIZE = 32


class BadInput(MlflowException):
    """Input that cannot be used: the server answers 400 with the message."""

    def __init__(self, message: str) -> None:
        """Keep the message."""
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)

    def serialize_as_json(self) -> str:
        """Return the server's answer: only the message.

        MLflow's server prefixes the whole input, which can be megabytes of base64.
        """
        self.message = str(self)
        return super().serialize_as_json()


class FaceGender(PythonModel):
    """An exported model behind MLflow's `pyfunc` interface."""

    def load_context(self, context: Any) -> None:
        """Load the LiteRT model of a logged model."""
        # Spark runs many of these on one machine and sets how many threads each may use.
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        self._predictor = load_litert(Path(context.artifacts["model"]), threads=threads)
        self._threshold = float(context.model_config["threshold"])
        if not 0 < self._threshold < 1:
            raise UserError(
                f"The model's threshold is a probability between 0 and 1, not {self._threshold}."
            )
        # The server answers each request in its own thread, and the runtime is not thread-safe.
        self._one_at_a_time = Lock()

    # No type hint for the input: MLflow would read one as a schema and refuse arrays.
    def predict(self, context: Any, model_input, params: Any = None) -> pd.DataFrame:  # type: ignore[no-untyped-def]  # noqa: ANN001
        """Return label and probability for each image.

        Args:
            context: MLflow's context, unused.
            model_input: images in any form that the module's docstring lists.
            params: `abstain_below`, same as in `predictor.label_of`.

        Raises:
            BadInput: an image cannot be read, there is none, or `abstain_below` is out of range.
        """
        abstain_below = _abstain_below(params or {})
        items = _items(model_input)
        if not items:
            raise BadInput("There is no image in the input.")
        size = self._predictor.size
        images = [_to_array(item, size, index) for index, item in enumerate(items)]
        with self._one_at_a_time:
            probabilities = np.concatenate(
                [
                    self._predictor.predict(np.stack(images[start : start + _BATCH_SIZE]))
                    for start in range(0, len(images), _BATCH_SIZE)
                ]
            )
        labels = [
            label_of(probability, threshold=self._threshold, abstain_below=abstain_below)
            for probability in probabilities
        ]
        return pd.DataFrame({"label": labels, "probability": probabilities})


def _enforce_params_schema(params: Any, schema: Any) -> Any:
    """Check parameters before MLflow does.

    MLflow ignores a misspelt parameter, and answers one of another type with the whole input.
    """
    if schema is None or [spec.name for spec in schema.params] != ["abstain_below"]:
        return _mlflows_own(params, schema)
    if params is None or params == {}:
        return {"abstain_below": schema.params[0].default}
    return {"abstain_below": _abstain_below(params)}


# MLflow has no hook for this. Each logged model runs this file, and only the first replaces it.
_pyfunc = import_module("mlflow.pyfunc")  # `mlflow.pyfunc` is a lazy loader, not the module
_mlflows_own = _pyfunc._enforce_params_schema
if _mlflows_own.__module__.startswith("mlflow."):
    _pyfunc._enforce_params_schema = _enforce_params_schema


def _abstain_below(params: Any) -> float:
    """Return the only parameter, checked."""
    if not isinstance(params, Mapping):
        raise BadInput("params is an object such as {'abstain_below': 0.9}.")
    if others := sorted(set(params) - {"abstain_below"}):
        raise BadInput(f"abstain_below is the only parameter, not {str(others)[:100]}.")
    value = params.get("abstain_below", 0.0)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise BadInput(f"abstain_below is a probability from 0 to 1, not {str(value)[:100]!r}.")
    return float(value)


def _items(model_input: Any) -> list[Any]:
    """Return one item for each image."""
    if isinstance(model_input, pd.DataFrame):
        if len(model_input.columns) != 1:
            raise BadInput(f"One column of images is expected, not {list(model_input.columns)}.")
        return model_input.iloc[:, 0].tolist()
    if isinstance(model_input, Mapping):
        return _items(_only_field(model_input))
    if isinstance(model_input, bytes | bytearray | str):
        return [model_input]
    if isinstance(model_input, np.ndarray) and model_input.ndim in {0, 3}:
        return [model_input]
    if isinstance(model_input, list | tuple | np.ndarray | pd.Series):
        return [_only_field(item) if isinstance(item, Mapping) else item for item in model_input]
    raise BadInput(f"A list of images is expected, not {type(model_input).__name__}.")


def _only_field(record: Mapping) -> Any:
    if len(record) != 1:
        raise BadInput(f"One field of images is expected, not {list(record)}.")
    return next(iter(record.values()))


def _to_array(item: Any, size: int, index: int) -> np.ndarray:
    """Return one image as uint8 (size, size, 3)."""
    if isinstance(item, np.ndarray) and item.ndim == 0:
        item = item.item()  # MLflow turns the text of a record into this
    try:
        if isinstance(item, str):
            item = base64.b64decode("".join(item.split()), validate=True)  # some encoders wrap
        if isinstance(item, bytes | bytearray):
            return decode_image(bytes(item), size)
        array = np.asarray(item)
        if array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
            raise InvalidImage(
                "base64 text, bytes, or an array of shape (height, width, 3) is expected, not "
                f"{type(item).__name__} of shape {array.shape}"
            )
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
            raise InvalidImage("an array holds whole numbers from 0 to 255")
        pixels = array.astype(np.uint8)
        if pixels.shape[:2] != (size, size):
            resized = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
            pixels = np.asarray(resized)
        return pixels
    except binascii.Error as error:
        raise BadInput(f"Image {index}: not base64 text: {error}") from None
    except (InvalidImage, ValueError) as error:
        raise BadInput(f"Image {index}: {error}") from None


mlflow.models.set_model(FaceGender())
