"""The threshold that travels in a model's file, so that every program labels alike.

It is a file in a ZIP archive after the model, where TFLite's metadata keeps associated files: the
runtime ignores it, and `unzip` shows it.
"""

import io
import json
import zipfile
from pathlib import Path

from facegender.errors import UserError
from facegender.model.attachment import attached

_NAME = "facegender.json"


def add_threshold(model: bytes, threshold: float) -> bytes:
    """Return a `.tflite` model with the lowest P(male) that is labelled male."""
    buffer = io.BytesIO(model)
    with zipfile.ZipFile(buffer, "a") as archive:
        # ZipInfo's own date is a constant.
        archive.writestr(zipfile.ZipInfo(_NAME), json.dumps({"threshold": threshold}))
    return buffer.getvalue()


def read_threshold(path: Path) -> float | None:
    """Return the threshold in a model's file; None if it has none, as `.keras` files do not.

    Raises:
        UserError: what the file has there is not a probability between 0 and 1.
    """
    try:
        content = attached(path, _NAME)
        if content is None:
            return None
        threshold = float(json.loads(content)["threshold"])
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError):
        threshold = 0.0
    if not 0 < threshold < 1:
        raise UserError(
            f"The threshold in {path.name} is not a probability between 0 and 1. `dvc repro` "
            "writes the model again."
        )
    return threshold
