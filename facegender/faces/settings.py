"""How faces are found and cut out. Kept apart because training depends on these values alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from facegender.params import Image as ImageParams


@dataclass(frozen=True)
class FaceCrop:
    """How faces are found and cut out; stored in the model's file.

    Attributes:
        margin: extra width of the detector's box, as a share of it; 0.25 makes it 1.25 times as
            wide.
        align: whether to turn the picture until the eyes are level.
        min_score: lowest score of a face, from 0 to 1.
        min_size: shortest side of a face, in pixels of the picture.
        whole_from: share of the picture's shorter side; if the crop is as wide or wider, the whole
            picture is taken.
    """

    margin: float
    align: bool
    min_score: float
    min_size: int
    whole_from: float = 0.95

    def to_json(self) -> str:
        """Return the attributes as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> FaceCrop:
        """Return what `to_json` wrote. Raises ValueError if the text is something else."""
        values = json.loads(text)
        if isinstance(values, dict):
            values.setdefault("whole_from", cls.whole_from)  # missing in the first models
        if not isinstance(values, dict) or {key: type(value) for key, value in values.items()} != {
            "margin": float,
            "align": bool,
            "min_score": float,
            "min_size": int,
            "whole_from": float,
        }:
            raise ValueError("not the parameters of a crop")
        crop = cls(**values)
        if not (
            0 <= crop.margin <= 4
            and 0 <= crop.min_score <= 1
            and crop.min_size >= 1
            and 0 < crop.whole_from <= 4
        ):
            raise ValueError("parameters of a crop out of range")
        return crop


def crop_of(image: ImageParams) -> FaceCrop | None:
    """Return how faces are cut out by the parameters, or None if whole pictures are judged."""
    if image.face == "none":
        return None
    return FaceCrop(**image.crop.model_dump(include={field.name for field in fields(FaceCrop)}))
