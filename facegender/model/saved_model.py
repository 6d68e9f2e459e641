"""Models as `.keras` files: equal weights give equal bytes, and loading does not run code."""

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from facegender.errors import UserError, reason_of


def save_model(model: keras.Model, path: Path) -> None:
    """Save a model as a `.keras` file whose bytes depend on the model alone.

    Keras writes the time and the addresses of shared objects into the archive. Here they become
    a constant and running numbers.
    """
    temporary = path.with_name(f".{path.stem}.tmp.keras")
    model.save(temporary)
    with zipfile.ZipFile(temporary) as saved, zipfile.ZipFile(path, "w") as fixed:
        for name in sorted(saved.namelist()):
            content = saved.read(name)
            if name == "metadata.json":
                metadata = json.loads(content) | {"date_saved": "1980-01-01@00:00:00"}
                content = json.dumps(metadata).encode()
            elif name == "config.json":
                content = json.dumps(_renumber(json.loads(content), {})).encode()
            # ZipInfo's own date is a constant.
            fixed.writestr(zipfile.ZipInfo(name), content)
    temporary.unlink()


def _renumber(item: Any, numbers: dict[int, int]) -> Any:
    """Return a copy of a configuration whose shared objects are numbered in order."""
    if isinstance(item, list):
        return [_renumber(child, numbers) for child in item]
    if not isinstance(item, dict):
        return item
    return {
        key: numbers.setdefault(child, len(numbers))
        if key == "shared_object_id"
        else _renumber(child, numbers)
        for key, child in item.items()
    }


def load_model(path: Path) -> keras.Model:
    """Load a saved model with stock Keras; code inside the file is never run.

    Raises:
        UserError: the file is missing, is not a `.keras` file, or needs more than stock layers:
            code, other classes, other files.
    """
    remedy = "`dvc repro` trains it, `dvc pull` fetches it from a remote."
    if path.suffix != ".keras":
        # Keras chooses the format by the ending; the older ones have no safe mode.
        raise UserError(f"The model {path.name} is not a .keras file. {remedy}")
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    # Untrusted files can make Keras raise anything.
    except Exception as error:
        # Leave out its advice on how to run the code after all.
        reason = reason_of(error).partition(" If you trust")[0].rstrip(".")
        raise UserError(f"Cannot load the model {path.name}: {reason}. {remedy}") from error


def predict_arrays(model: keras.Model, batches: Iterable[np.ndarray]) -> np.ndarray:
    """Return P(male), or the logit if the model ends in it, for batches of decoded images.

    Args:
        model: a saved model, or one in training.
        batches: uint8 arrays of shape (n, size, size, 3).

    Returns:
        float64 of shape (total,).
    """
    # Compiled as in `predict`, which repeats its set-up at each call.
    outputs = [np.asarray(model.predict_on_batch(batch))[:, 0] for batch in batches]
    return np.concatenate(outputs).astype(np.float64) if outputs else np.empty(0)
