"""LiteRT: a `.tflite` model run by the light runtime, which starts in a fraction of a second."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from facegender.errors import UserError
from facegender.prediction import Predictor


def load_litert(path: Path, *, threads: int = 1) -> Predictor:
    """Load a `.tflite` file that takes uint8 (n, size, size, 3) and gives P(male), float32 (n, 1).

    Args:
        path: what `export` wrote.
        threads: of the computation. Several predictors with one thread each do more than one
            with several, whose threads wait for each other after every layer.

    Raises:
        UserError: the file is missing, damaged, or another kind of model.
    """
    # Imported here, so that naming a Keras model needs no second runtime.
    from ai_edge_litert.interpreter import Interpreter

    remedy = "`dvc repro` makes it, `dvc pull` fetches it from a remote."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the model {path.name}: {error.strerror}. {remedy}") from error
    try:
        with _silent():
            interpreter = Interpreter(
                # An empty file would be taken for no file at all.
                model_content=content or b"\0",
                num_threads=threads,
            )
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"The model {path.name} is damaged or no LiteRT model: {error}. {remedy}"
        ) from error
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    shape = inputs[0]["shape_signature"].tolist()
    if (
        len(inputs) != 1
        or len(outputs) != 1
        or inputs[0]["dtype"] != np.uint8
        or outputs[0]["dtype"] != np.float32
        or len(shape) != 4
        or shape[0] != -1
        or shape[1] != shape[2]
        or shape[3] != 3
    ):
        raise UserError(
            f"The model {path.name} is none of this project's: it takes {shape} of "
            f"{inputs[0]['dtype'].__name__}, where uint8 images (n, size, size, 3) are expected. "
            f"{remedy}"
        )
    source, target = inputs[0]["index"], outputs[0]["index"]
    rows = 1

    def predict(batch: np.ndarray) -> np.ndarray:
        nonlocal rows
        if len(batch) != rows:
            interpreter.resize_tensor_input(source, batch.shape)
            interpreter.allocate_tensors()
            rows = len(batch)
        interpreter.set_tensor(source, batch)
        interpreter.invoke()
        return interpreter.get_tensor(target)[:, 0].astype(np.float64)

    return Predictor(shape[1], predict)


@contextmanager
def _silent() -> Iterator[None]:
    """Send what C++ writes to standard error nowhere; its errors arrive as exceptions.

    The runtime greets with a line on its delegate, and offers no switch for it.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
