"""Photos with a box around each face, and its label."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from facegender.data.images import InvalidImage, decode_picture
from facegender.errors import UserError
from facegender.inference.prediction import Prediction

_log = logging.getLogger(__name__)
_COLOURS = {"female": "#d95f02", "male": "#1b6ca8"}


def check_folder(folder: Path, sources: Sequence[tuple[str, bytes | Path]]) -> None:
    """Raise UserError if a folder for drawn pictures contains one to be judged.

    It might be overwritten, and the next run would judge the drawn ones, too.
    """
    target = folder.resolve()
    for name, source in sources:
        if isinstance(source, Path) and (
            target in source.resolve().parents
            or target in (source.parent.resolve() / source.name).parents  # a link in the folder
        ):
            raise UserError(f"--draw {folder} contains the input {name}: choose another folder.")


def draw_predictions(
    predictions: Iterable[list[Prediction]],
    sources: Sequence[tuple[str, bytes | Path]],
    folder: Path,
) -> Iterator[list[Prediction]]:
    """Pass predictions on, and write each image with its faces into a folder, as NNNN-name.png.

    Args:
        predictions: those of each image, in the order of `sources`.
        sources: names, each with the bytes or the path of an image.

    Raises:
        UserError: the folder cannot be written.
    """
    for number, ((name, source), faces) in enumerate(zip(sources, predictions, strict=True), 1):
        if faces[0].error is None:
            try:
                picture, scale = decode_picture(source)
            except InvalidImage as error:
                # It was readable when it was judged.
                _log.warning("%r is not drawn: %s", name, error)
                yield faces
                continue
            for face in reversed(faces):  # the largest on top
                _draw(picture, face, scale)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                # A file's name has at most 255 bytes.
                stem = os.fsencode(Path(name).stem)[:245].decode(errors="ignore")
                picture.save(folder / f"{number:04}-{stem}.png")
            except OSError as error:
                raise UserError(
                    f"Cannot write into {folder}: {error.strerror}. Name another folder."
                ) from error
        yield faces


def _draw(picture: Image.Image, face: Prediction, scale: float) -> None:
    pen = ImageDraw.Draw(picture)
    text = f"{face.label}"
    if face.probability is not None:
        text += f", P(male) {face.probability:.2f}"
    colour = _COLOURS.get(str(face.label), "#555555")
    left, top, width, height = (
        (value * scale for value in (face.left, face.top, face.width or 0, face.height or 0))
        if face.left is not None and face.top is not None
        else (0, 0, *picture.size)
    )
    stroke = max(1, max(picture.size) // 300)
    box = (left, top, left + width, top + height)
    pen.rectangle(box, outline=colour, width=stroke)
    font = ImageFont.load_default(size=max(10, max(picture.size) // 40))
    _, _, right, bottom = pen.textbbox((0, 0), text, font=font)
    # Inside the picture, at its left and upper edge if it has no room.
    corner = max(min(left, picture.width - right), 0), max(min(top, picture.height - bottom), 0)
    pen.rectangle(pen.textbbox(corner, text, font=font), fill=colour)
    pen.text(corner, text, fill="white", font=font)
