"""The crop of the face that a model was trained on, inside its file."""

from pathlib import Path

from facegender.errors import UserError
from facegender.faces.settings import FaceCrop
from facegender.model.attachment import attach, attached

_NAME = "face_crop.json"


def write_crop(path: Path, crop: FaceCrop | None) -> None:
    """Write the crop into a model's file; without one, the file stays as it is."""
    if crop is not None:
        attach(path, _NAME, crop.to_json())


def read_crop(path: Path) -> FaceCrop | None:
    """Return a model file's crop, None for whole pictures. Raises UserError if it is damaged."""
    try:
        text = attached(path, _NAME)
        return None if text is None else FaceCrop.from_json(text)
    except ValueError as error:
        raise UserError(
            f"The model {path.name} does not say how faces are cut out: its {_NAME} is damaged "
            f"({error}). `dvc repro` builds the model, `dvc pull` fetches it from a remote."
        ) from error
