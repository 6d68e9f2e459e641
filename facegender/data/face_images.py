"""Cuts the faces out of an image file, as a model takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from facegender.data.images import decode_image, decode_picture
from facegender.faces.crop import cut_out, find_faces
from facegender.faces.detector import Face
from facegender.faces.settings import FaceCrop


def face_images(
    source: bytes | Path, size: int, crop: FaceCrop | None
) -> list[tuple[Face | None, np.ndarray]]:
    """Return the faces of an image, the largest first, each with its pixels.

    Training, prediction, serving and scoring all call this.

    Args:
        source: the file's bytes, or its path.
        size: side, in pixels, of the model's input.
        crop: how faces are cut out; None takes the whole picture.

    Returns:
        Faces, in pixels of the upright image, with uint8 arrays of shape (size, size, 3). Without a
        crop or a face: None, with the whole picture.

    Raises:
        InvalidImage: as `images.decode_image` does.
    """
    if crop is None:
        return [(None, decode_image(source, size))]
    return picture_faces(*decode_picture(source), size, crop)


def picture_faces(
    picture: Image.Image, scale: float, size: int, crop: FaceCrop
) -> list[tuple[Face | None, np.ndarray]]:
    """Return the faces of what `decode_picture` gave, each with its pixels: see `face_images`."""
    faces: list[Face | None] = [*find_faces(picture, crop, scale)] or [None]
    return [(face, cut_out(picture, face and face.scaled(scale), crop, size)) for face in faces]


def cut_image(
    source: bytes | Path,
    size: int,
    crop: FaceCrop | None,
    face: Face | None,
    *,
    border: int = 0,
) -> np.ndarray:
    """Return an image as the model takes it, cut to a known face: see `face_images`.

    `border` is that of `crop.cut_out`, and needs a crop.
    """
    if crop is None:
        return decode_image(source, size)
    picture, scale = decode_picture(source)
    return cut_out(picture, face and face.scaled(scale), crop, size, border=border)


def box_of(face: Face) -> dict[str, float]:
    """Return the box and score of a face, by name."""
    return {name: getattr(face, name) for name in ("left", "top", "width", "height", "score")}
