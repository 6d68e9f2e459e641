"""Cut a face out of a picture, in training and prediction alike."""

from __future__ import annotations

import math
import threading

import numpy as np
from PIL import Image

from facegender.faces.detector import Detector, Face
from facegender.faces.settings import FaceCrop

_LOCAL = threading.local()


def find_faces(picture: Image.Image, crop: FaceCrop, scale: float = 1.0) -> list[Face]:
    """Return the faces in an upright RGB picture as `Detector.find` does. Thread-safe."""
    if not hasattr(_LOCAL, "detector"):
        _LOCAL.detector = Detector()
    return _LOCAL.detector.find(
        picture, min_score=crop.min_score, min_size=crop.min_size, scale=scale
    )


def cut_out(
    picture: Image.Image, face: Face | None, crop: FaceCrop, size: int, *, border: int = 0
) -> np.ndarray:
    """Return a face as the model sees it; the whole picture if the face fills it, or is None.

    Beyond the picture's edge, the edge is repeated.

    Args:
        picture: upright RGB picture that the face was found in.
        crop: margin and alignment.
        size: side, in pixels, of what the model sees.
        border: width, in pixels, of the surroundings to add on each side, at the same scale.

    Returns:
        uint8 array of shape (size + 2 * border, size + 2 * border, 3).
    """
    side = 0.0 if face is None else max(face.width, face.height) * (1 + crop.margin)
    if face is None or side >= crop.whole_from * min(picture.size):
        gap = 2.0 if min(picture.size) > 4 * size else None
        whole = picture.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=gap)
        return np.pad(np.asarray(whole), ((border, border), (border, border), (0, 0)), mode="edge")
    side *= (size + 2 * border) / size
    x, y = face.left + face.width / 2, face.top + face.height / 2
    angle = face.tilt if crop.align else 0.0
    # Half the side of what a rotation needs, and two pixels for the filter.
    reach = math.ceil(side / 2 * (abs(math.cos(angle)) + abs(math.sin(angle)))) + 2
    left, top = round(x) - reach, round(y) - reach
    region = _region(picture, left, top, 2 * reach)
    x, y = x - left, y - top
    if angle:
        # Pillow rotates counter-clockwise as seen on the screen.
        region = region.rotate(math.degrees(angle), Image.Resampling.BICUBIC, center=(x, y))
    half = side / 2
    box = (x - half, y - half, x + half, y + half)
    pixels = (size + 2 * border, size + 2 * border)
    return np.asarray(region.resize(pixels, Image.Resampling.BICUBIC, box=box))


def _region(picture: Image.Image, left: int, top: int, side: int) -> Image.Image:
    """Return a square of a picture; beyond the edge, the edge is repeated."""
    right, bottom = left + side, top + side
    inside = max(left, 0), max(top, 0), min(right, picture.width), min(bottom, picture.height)
    region = picture.crop(inside)
    if region.size == (side, side):
        return region
    beyond = ((inside[1] - top, bottom - inside[3]), (inside[0] - left, right - inside[2]), (0, 0))
    return Image.fromarray(np.pad(np.asarray(region), beyond, mode="edge"))
