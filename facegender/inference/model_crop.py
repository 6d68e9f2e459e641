"""How faces are cut out, stored in a model's file."""

from pathlib import Path

from facegender.errors import UserError
from facegender.faces.settings import FaceCrop
from facegender.model.attachment import attach, attached

_NAME = "face_crop.json"


def write_crop(path: Path, crop: FaceCrop | None) -> None:
    """Write the crop into a model's file; None does not change it."""
    if crop is not None:
        attach(path, _NAME, crop.to_json())


def read_crop(path: Path) -> FaceCrop | None:
    """Return a model file's crop, or None for whole pictures. Raises UserError if damaged."""
    try:
        text = attached(path, _NAME)
        return None if text is None else FaceCrop.from_json(text)
    except ValueError as error:
        raise UserError(
            f"The model {path.name} does not say how faces are cut out: its {_NAME} is damaged "
            f"({error}). `dvc repro` builds the model, `dvc pull` fetches it from a remote."
        ) from error
