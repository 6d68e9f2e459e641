"""The model as MLflow serves it. MLflow runs this file to load a logged model (no pickle).

Input: the bytes of image files, their base64 text, or uint8 RGB arrays; one image, a list or an
array of them, or a DataFrame with one column. Output: a DataFrame with a row for each image:
`label` (female or male, as perceived, or uncertain) and `probability` (of the label male). A model
that judges faces labels the largest one, or answers `no face`, and adds `faces`: a list with the
box, score, label and probability of each. The index is that of a DataFrame or Series.
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

from facegender.data.face_images import box_of, face_images, picture_faces
from facegender.data.images import InvalidImage
from facegender.errors import UserError
from facegender.faces.detector import Face
from facegender.faces.settings import FaceCrop
from facegender.inference.litert import load_litert
from facegender.inference.predictor import NO_FACE, label_of

_DEFAULTS = {"abstain_below": 0.0, "whole": False}


class BadInput(MlflowException):
    """Input that cannot be used: the server answers 400 with the message."""

    def __init__(self, message: str) -> None:
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
        # Spark runs many models on one machine, and sets how many threads each may use.
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
            model_input: images in any form that the module's docstring lists.
            params: `abstain_below`, as in `predictor.label_of`; `whole`, whether to judge pictures
                whole, as if they were cut out already.

        Raises:
            BadInput: an image cannot be read, there is none, or a parameter is wrong.
        """
        options = _checked(params)
        abstain_below = options["abstain_below"]
        items = _items(model_input)
        if not items:
            raise BadInput("There is no image in the input.")
        size = self._predictor.size
        crop = None if options["whole"] else self._predictor.crop
        # The faces of each picture, with their pixels.
        found = [_to_faces(item, size, crop, index) for index, item in enumerate(items)]
        images = [pixels for faces in found for face, pixels in faces if face or not crop]
        with self._one_at_a_time:
            probabilities = iter(list(self._predictor.predict_all(images)))

        def answer(face: Face | None) -> dict[str, Any]:
            if crop and not face:
                return {"label": NO_FACE, "probability": None}
            probability = next(probabilities)
            label = label_of(probability, threshold=self._threshold, abstain_below=abstain_below)
            return {"label": label, "probability": probability}

        rows = []
        for faces in found:
            answers = [(face, answer(face)) for face, _ in faces]
            row = dict(answers[0][1])
            if crop:
                row["faces"] = [box_of(face) | judged for face, judged in answers if face]
            rows.append(row)
        is_table = isinstance(model_input, pd.DataFrame | pd.Series)
        frame = pd.DataFrame(rows, index=model_input.index if is_table else None)
        if crop:
            # Numbers would make None NaN, which is not valid JSON.
            frame["probability"] = np.array([row["probability"] for row in rows], dtype=object)
        return frame


def _enforce_params_schema(params: Any, schema: Any) -> Any:
    """Check parameters before MLflow does.

    MLflow ignores a misspelt parameter, and answers one of another type with the whole input.
    """
    if schema is None or {spec.name for spec in schema.params} != {*_DEFAULTS}:
        return _mlflows_own(params, schema)
    return _checked(params)


# MLflow has no hook for this. Each logged model runs this file, and only the first replaces it.
_pyfunc = import_module("mlflow.pyfunc")  # `mlflow.pyfunc` is a lazy loader, not the module
_mlflows_own = _pyfunc._enforce_params_schema  # type: ignore[attr-defined]
if _mlflows_own.__module__.startswith("mlflow."):
    _pyfunc._enforce_params_schema = _enforce_params_schema  # type: ignore[attr-defined]


def _checked(params: Any) -> dict[str, Any]:
    """Return all parameters, checked."""
    if params is None:
        return _DEFAULTS
    if not isinstance(params, Mapping):
        raise BadInput("params is an object such as {'abstain_below': 0.9}.")
    if others := sorted(set(params) - {*_DEFAULTS}):
        raise BadInput(f"The parameters are {', '.join(_DEFAULTS)}, not {str(others)[:100]}.")
    found = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in {**_DEFAULTS, **params}.items()
    }
    value, whole = found["abstain_below"], found["whole"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise BadInput(f"abstain_below is a probability from 0 to 1, not {str(value)[:100]!r}.")
    if not isinstance(whole, bool):
        raise BadInput(f"whole is true or false, not {str(whole)[:100]!r}.")
    return {"abstain_below": float(value), "whole": whole}


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


def _to_faces(
    item: Any, size: int, crop: FaceCrop | None, index: int
) -> list[tuple[Face | None, np.ndarray]]:
    """Return the faces of one image, or None with the whole image, as uint8 (size, size, 3)."""
    if isinstance(item, np.ndarray) and item.ndim == 0:
        item = item.item()  # MLflow makes the text of a record an array
    try:
        if isinstance(item, str):
            item = base64.b64decode("".join(item.split()), validate=True)  # some encoders wrap
        if isinstance(item, bytes | bytearray):
            return face_images(bytes(item), size, crop)
        array = np.asarray(item)
        if array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
            raise InvalidImage(
                "base64 text, bytes, or an array of shape (height, width, 3) is expected, not "
                f"{type(item).__name__} of shape {array.shape}"
            )
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
            raise InvalidImage("an array holds whole numbers from 0 to 255")
        pixels = array.astype(np.uint8)
        if crop:
            return picture_faces(Image.fromarray(pixels), 1.0, size, crop)
        if pixels.shape[:2] != (size, size):
            resized = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
            pixels = np.asarray(resized)
        return [(None, pixels)]
    except binascii.Error as error:
        raise BadInput(f"Image {index}: not base64 text: {error}") from None
    except (InvalidImage, ValueError) as error:
        raise BadInput(f"Image {index}: {error}") from None


mlflow.models.set_model(FaceGender())
