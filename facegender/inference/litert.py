"""LiteRT: a `.tflite` model run by the light runtime, which starts in a fraction of a second."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from facegender.errors import UserError
from facegender.inference.predictor import Predictor

_REMEDY = "`dvc repro` makes it, `dvc pull` fetches it from a remote."
_PROBE_SECONDS = 60


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

    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"Cannot read the model {path.name}: {error.strerror}. {_REMEDY}"
        ) from error
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
            f"The model {path.name} is damaged or no LiteRT model: "
            f"{' '.join(str(error).split()).rstrip('.')}. {_REMEDY}"
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
            f"{_REMEDY}"
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


def probe_litert(path: Path) -> None:
    """Run a `.tflite` file once in a process of its own, for a crafted one ends its process.

    The runtime trusts the file's structure and follows it to wherever it points. Call this before
    threads are started, of which the other process has none.

    Raises:
        UserError: the runtime did not survive, or did not end in a minute. Whatever else is wrong
            with the file, `load_litert` says.
    """
    if not hasattr(os, "fork"):  # Windows
        return
    # Imported before, so that the two processes do not both take the time.
    import resource
    import signal

    import ai_edge_litert.interpreter  # noqa: F401

    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            # What ends this process, whatever handler of the caller it has inherited.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_PROBE_SECONDS)
            with _silent():
                predictor = load_litert(path)
                predictor.predict(np.zeros((1, predictor.size, predictor.size, 3), np.uint8))
                # Within, for the runtime may also fail when it ends.
                del predictor
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise UserError(
            f"The model {path.name} is damaged or made to do harm: LiteRT's runtime does not "
            f"survive it ({signal.Signals(os.WTERMSIG(status)).name}). {_REMEDY}"
        )


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
