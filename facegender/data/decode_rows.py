"""Decoding of rows of processed data, as each process of preprocessing runs it.

Kept separate because every worker imports this module, and importing pandas takes longer than
decoding a thousand images.
"""

import math
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from facegender.data.face_images import cut_image
from facegender.data.images import InvalidImage, decode_picture, verdict
from facegender.errors import UserError
from facegender.faces.crop import find_faces
from facegender.faces.detector import Face
from facegender.faces.settings import FaceCrop
from facegender.files import file_sha256


def write_rows(
    paths: list[Path],
    array: Path,
    *,
    offset: int,
    first_row: int,
    size: int,
    crop: FaceCrop | None = None,
    faces: Sequence[Face | None] = (),
    border: int = 0,
) -> tuple[int, dict[int, str]]:
    """Decode images into consecutive rows of an array on disk.

    Args:
        array: file to write into, of its full size.
        offset: bytes before its first row.
        first_row: row of the first of the images.
        size: pixels a side, without the border.
        crop: how faces are cut out; None takes whole images.
        faces: the face of each image, with `crop`.
        border: same as in `crop.cut_out`.

    Returns:
        The number of images, and by row the reasons why some could not be decoded.

    Raises:
        UserError: a file could not be read whole, or memory ran out, several times.
    """
    # Pillow reuses this many blocks of memory. New pages for every image would take a fifth of the
    # time of decoding it.
    Image.core.set_blocks_max(4)
    reasons = {}
    row_bytes = (size + 2 * border) ** 2 * 3
    # Plain writes, not a memory map: mapped pages would count as this process's memory.
    with array.open("r+b") as file:
        for row, (path, face) in enumerate(_with_faces(paths, faces), first_row):
            try:
                pixels = cut_image(path, size, crop, face, border=border)
            except InvalidImage as error:
                reasons[row] = verdict(error, path)
                continue
            file.seek(offset + row * row_bytes)
            file.write(pixels.data)
    return len(paths), reasons


def decode_rows(
    paths: list[Path],
    digests: list[str],
    *,
    first_row: int,
    size: int,
    crop: FaceCrop | None = None,
    faces: Sequence[Face | None] = (),
    border: int = 0,
) -> tuple[int, np.ndarray, dict[int, str]]:
    """Decode images on another machine, which must see the same files.

    Args:
        digests: SHA-256 of each file. The other arguments are those of `write_rows`.

    Returns:
        `first_row`, the images as uint8 of shape (n, side, side, 3), and by row the reasons why
        some could not be decoded; their pixels are zero.

    Raises:
        UserError: a file is missing, cannot be read, or differs from its digest.
    """
    Image.core.set_blocks_max(4)
    side = size + 2 * border
    pixels = np.zeros((len(paths), side, side, 3), np.uint8)
    reasons = {}
    for index, (path, face) in enumerate(_with_faces(paths, faces)):
        check_file(path, digests[index])
        try:
            pixels[index] = cut_image(path, size, crop, face, border=border)
        except InvalidImage as error:
            reasons[first_row + index] = verdict(error, path)
    return first_row, pixels, reasons


def locate_faces(
    paths: list[Path],
    crop: FaceCrop,
    *,
    first_row: int,
    digests: list[str] | None = None,
    boxes: list[list[tuple[float, float, float, float]]] | None = None,
) -> tuple[int, list[tuple[list[Face], str | None]]]:
    """Find the faces of each image.

    Args:
        digests: SHA-256 of each file, to check on another machine.
        boxes: left, top, width and height of the faces of each image, taken if usable.

    Returns:
        `first_row`, and for each image its faces, the largest first, and what is wrong with its
        boxes; an image that cannot be decoded has no face.

    Raises:
        UserError: a file is missing, cannot be read, or differs from its digest.
    """
    found: list[tuple[list[Face], str | None]] = []
    for index, path in enumerate(paths):
        if digests:
            check_file(path, digests[index])
        try:
            picture, scale = decode_picture(path)
        except InvalidImage:
            found.append(([], None))
            continue
        width, height = (round(side / scale) for side in picture.size)
        given, problem = _given_faces(boxes[index], width, height) if boxes else ([], None)
        found.append((given or find_faces(picture, crop, scale), problem))
    return first_row, found


def _given_faces(
    boxes: Sequence[tuple[float, float, float, float]], image_width: int, image_height: int
) -> tuple[list[Face], str | None]:
    """Return the faces of the usable boxes, the largest first, and what is wrong with another."""
    if not boxes:
        return [], "no box in the table"
    faces, problem = [], None
    for box in boxes:
        left, top, width, height = box
        if not all(map(math.isfinite, box)):
            problem = "the box is not four numbers"
        elif width <= 0 or height <= 0:
            problem = "the box is empty"
        elif max(box[2:]) <= 1:
            problem = "the box is at most a pixel large: shares of the picture are not read"
        elif not (0 <= left + width / 2 <= image_width and 0 <= top + height / 2 <= image_height):
            size = image_width, image_height
            problem = f"the box lies outside: its centre is not within {size} pixels"
        else:
            unknown = (math.nan,) * 5
            faces.append(Face(left, top, width, height, *unknown))
    return sorted(faces, key=lambda face: -face.width * face.height), problem


def _with_faces(
    paths: list[Path], faces: Sequence[Face | None]
) -> Iterator[tuple[Path, Face | None]]:
    return zip(paths, faces or [None] * len(paths), strict=True)


def check_file(path: Path, digest: str) -> None:
    """Raise UserError unless the file exists and has this SHA-256."""
    try:
        problem = None if file_sha256(path) == digest else "another file is there"
    except OSError as error:
        problem = error.strerror
    if problem:
        raise UserError(
            f"The worker on {platform.node()} does not see the raw data: {path}: {problem}. Every "
            "worker needs this folder under the same path, as on a shared file system."
        )
