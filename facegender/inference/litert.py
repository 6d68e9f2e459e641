"""Run a `.tflite` model with LiteRT, which starts in a fraction of a second."""

import io
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

from facegender.errors import UserError
from facegender.inference.model_crop import read_crop
from facegender.inference.predictor import Predictor, checked
from facegender.model.interpreter import open_interpreter

_REMEDY = "`dvc repro` builds the model, `dvc pull` fetches it from a remote."
_PROBE_SECONDS = 60
# More than the attached texts take.
_ATTACHED_BYTES = 20_000


def load_litert(path: Path, *, threads: int = 1) -> Predictor:
    """Load a `.tflite` file from uint8 (n, size, size, 3) to P(male), float32 (n, 1).

    Args:
        threads: number of threads of the computation. Several predictors with one thread each are
            faster than one with several threads, which wait for each other after every layer.

    Raises:
        UserError: the file is missing, damaged, or another kind of model.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"Cannot read the model {path.name}: {error.strerror}. {_REMEDY}"
        ) from error
    try:
        interpreter = open_interpreter(content, threads=threads)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"The model {path.name} is damaged or not a LiteRT model: "
            f"{' '.join(str(error).split()).rstrip('.')}. {_REMEDY}"
        ) from error
    if _lost_its_end(content):
        raise UserError(
            f"The model {path.name} is cut off: the end of the file, which says how to use the "
            f"model, is missing. {_REMEDY}"
        )
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    taken, given = (
        [(item["shape_signature"].tolist(), item["dtype"].__name__) for item in items]
        for items in (inputs, outputs)
    )
    match taken, given:
        case [([-1, size, width, 3], "uint8")], [([-1, 1], "float32")] if size == width:
            pass
        case _:
            raise UserError(
                f"This project did not export the model {path.name}: it takes {taken} and gives "
                f"{given}, where uint8 images (n, size, size, 3) and float32 probabilities (n, 1) "
                f"are expected. {_REMEDY}"
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
        return checked(interpreter.get_tensor(target)[:, 0].astype(np.float64), path.name)

    return Predictor(size, predict, read_crop(path))


def _lost_its_end(content: bytes) -> bool:
    """Return whether the archive attached to a model (`model.attachment`) is cut off."""
    last = content.rfind(b"PK\3\4", -_ATTACHED_BYTES)
    return last >= 0 and not zipfile.is_zipfile(io.BytesIO(content))


def probe_litert(path: Path) -> None:
    """Run an untrusted `.tflite` file once in a child process.

    The runtime does not verify the file's structure, so a damaged or malicious file can crash the
    process that loads it. The child process turns a crash into an error message. It has all rights
    of this one, so it does not contain an attack.

    Raises:
        UserError: the child process crashed or did not end in time. `load_litert` reports all
            other faults of the file.
    """
    # -P: the working directory may hold anything.
    command = [sys.executable, "-P", "-m", "facegender.inference.litert", str(path)]
    try:
        code = subprocess.run(command, capture_output=True, timeout=_PROBE_SECONDS).returncode
    except subprocess.TimeoutExpired:
        raise UserError(
            f"The model {path.name} is damaged or malicious: LiteRT does not finish within "
            f"{_PROBE_SECONDS} seconds. {_REMEDY}"
        ) from None
    if code < 0:
        raise UserError(
            f"The model {path.name} is damaged or malicious: it crashes LiteRT "
            f"({signal.Signals(-code).name}). {_REMEDY}"
        )


if __name__ == "__main__":
    probed = load_litert(Path(sys.argv[1]))
    probed.predict(np.zeros((1, probed.size, probed.size, 3), np.uint8))
