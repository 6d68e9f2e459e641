"""The threshold, stored in a model's file so that every program labels alike."""

import json
from pathlib import Path

from facegender.errors import UserError
from facegender.model.attachment import attach, attached

_NAME = "facegender.json"


def write_threshold(path: Path, threshold: float) -> None:
    """Add the lowest P(male) that is labelled male to a `.tflite` file."""
    attach(path, _NAME, json.dumps({"threshold": threshold}))


def read_threshold(path: Path) -> float | None:
    """Return a model file's threshold, or None. Raises UserError if it is not in (0, 1)."""
    try:
        content = attached(path, _NAME)
        if content is None:
            return None
        threshold = float(json.loads(content)["threshold"])
    except (ValueError, TypeError, KeyError):
        threshold = 0.0
    if not 0 < threshold < 1:
        raise UserError(
            f"The threshold in {path.name} is not a probability between 0 and 1. `dvc repro` "
            "writes the model again."
        )
    return threshold
