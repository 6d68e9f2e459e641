"""Count how many faces are found, how many boxes are false, and how many labels are right.

Pastes each portrait of a folder of class folders at several sizes, makes group photos of 2 to 12
faces on noise and on photos without people (scikit-learn's), and draws pictures without a face.
With a model, prints its accuracy on the portraits as they are, judged whole and by face, and for
how many faces in group photos its label is the same as in the portrait.

    python -m bench.faces ../shared/faces --model models/model.tflite
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.backdrops import EMPTY, noise, photo
from bench.common import CROP
from facegender.data.image_files import find_images
from facegender.data.images import decode_picture
from facegender.faces.crop import cut_out, find_faces
from facegender.faces.detector import Face
from facegender.inference.litert import load_litert
from facegender.inference.prediction import predict_images
from facegender.inference.predictor import Predictor
from facegender.runtime.entry_points import run_command

_OVERLAP = 0.1  # of the smaller of two portraits
_EMPTY_OF_A_KIND = 20

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Portrait:
    """A square picture of one face.

    Attributes:
        picture: the portrait.
        face: its face.
        male: P(male) by the model, if there is one.
    """

    picture: Image.Image
    face: Face
    male: float | None


@dataclass
class Tally:
    """Counts of pasted faces."""

    pictures: int = 0
    faces: int = 0
    found: int = 0
    false: int = 0
    judged: int = 0
    alike: int = 0

    def show(self, name: str) -> None:
        """Print the counts."""
        alike = f", {self.alike} of {self.judged} labelled alike" if self.judged else ""
        print(
            f"{name:<42} {self.found} of {self.faces} found ({self.found / self.faces:.3f}), "
            f"{self.false} false boxes in {self.pictures} pictures{alike}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("faces", type=Path, help="folder of female/ and male/, square pictures")
    parser.add_argument("--model", type=Path, help="a .tflite file that was trained on crops")
    parser.add_argument("--groups", type=int, default=100, help="group photos of each kind")
    parser.add_argument("--only", default="", help="only lines whose name has this text")
    args = parser.parse_args()
    paths = [args.faces / path for path in find_images(args.faces)]
    predictor = load_litert(args.model) if args.model else None
    portraits = [portrait for path in paths if (portrait := read_portrait(path, predictor))]
    print(f"{'portraits as they are':<42} {len(portraits)} of {len(paths)} found", flush=True)

    lines: dict[str, Callable[[str], None]] = {}
    for side in (1024, 341, 170, 102):
        lines[f"one portrait of {side} pixels"] = partial(
            show_alone, portraits=portraits, side=side, predictor=predictor
        )
    for kind, backdrop in (("noise", noise), ("photos", photo)):
        for by in ("portraits", "faces"):
            lines[f"groups: {by} of 60 to 300 pixels, {kind}"] = partial(
                show_groups,
                portraits=portraits,
                by_face=by == "faces",
                backdrop=backdrop,
                count=args.groups,
                predictor=predictor,
            )
    for kind, draw in EMPTY.items():
        lines[f"no face: {kind}"] = partial(show_empty, draw=draw)
    for which in ("whole", "largest"):
        if predictor:
            lines[f"labels, judging the {which}"] = partial(
                show_labels, predictor=predictor, paths=paths, which=which
            )
    for name, show in lines.items():
        if args.only in name:
            show(name)


def show_alone(
    name: str, *, portraits: Sequence[Portrait], side: int, predictor: Predictor | None
) -> None:
    """Paste each portrait on noise, and print how many are found."""
    tally, generator = Tally(), np.random.default_rng(side)
    for portrait in portraits:
        paste(noise(generator), [portrait], [side], generator, predictor, tally)
    tally.show(name)


def show_groups(
    name: str,
    *,
    portraits: Sequence[Portrait],
    by_face: bool,
    backdrop: Callable[..., Image.Image],
    count: int,
    predictor: Predictor | None,
) -> None:
    """Make group photos, and print how many faces are found.

    Args:
        name: name of the line.
        portraits: portraits to choose from.
        by_face: whether the face, not the portrait, has 60 to 300 pixels.
        backdrop: function that draws the background.
        count: number of photos.
        predictor: model that labels the faces, or None.
    """
    tally, generator = Tally(), np.random.default_rng(1)
    pool = [head(portrait) for portrait in portraits] if by_face else portraits
    for _ in range(count):
        chosen = [pool[i] for i in generator.choice(len(pool), generator.integers(2, 13))]
        sides = generator.integers(60, 301, len(chosen)).tolist()
        if by_face:
            sides = [
                round(side * item.picture.width / item.face.width)
                for side, item in zip(sides, chosen, strict=True)
            ]
        canvas = backdrop(generator, *((1600, 1200) if by_face else (1024, 1024)))
        paste(canvas, chosen, sides, generator, predictor, tally)
    tally.show(name)


def show_empty(name: str, *, draw: Callable[[np.random.Generator], Image.Image]) -> None:
    """Print how many boxes pictures without a face have."""
    generator = np.random.default_rng(2)
    boxes = sum(len(find_faces(draw(generator), CROP)) for _ in range(_EMPTY_OF_A_KIND))
    print(f"{name:<42} {boxes} false boxes in {_EMPTY_OF_A_KIND} pictures", flush=True)


def show_labels(name: str, *, predictor: Predictor, paths: list[Path], which: Any) -> None:
    """Print the accuracy of a model on the portraits as they are."""
    sources: list[tuple[str, bytes | Path]] = [(path.parent.name, path) for path in paths]
    answers = predict_images([predictor], sources, faces=which)
    right = sum(answer.label == answer.image for (answer,) in answers)
    print(f"{name:<42} {right} of {len(paths)} right ({right / len(paths):.3f})", flush=True)


def read_portrait(path: Path, predictor: Predictor | None) -> Portrait | None:
    """Return a portrait with its largest face; None if none is found."""
    picture = decode_picture(path)[0]
    faces = find_faces(picture, CROP)
    return Portrait(picture, faces[0], judge(picture, faces[0], predictor)) if faces else None


def judge(picture: Image.Image, face: Face, predictor: Predictor | None) -> float | None:
    """Return P(male) of a face, or None without a model."""
    if predictor is None:
        return None
    pixels = cut_out(picture, face, predictor.crop or CROP, predictor.size)
    return float(predictor.predict(pixels[None])[0])


def head(portrait: Portrait) -> Portrait:
    """Return the square around the face, twice as wide as it if the portrait is that large."""
    face, picture = portrait.face, portrait.picture
    x, y = round(face.left + face.width / 2), round(face.top + face.height / 2)
    half = min(round(face.width), x, y, picture.width - x, picture.height - y)
    moved = replace(face, left=face.left - x + half, top=face.top - y + half)
    return Portrait(picture.crop((x - half, y - half, x + half, y + half)), moved, portrait.male)


def paste(
    canvas: Image.Image,
    portraits: Sequence[Portrait],
    sides: Sequence[int],
    generator: np.random.Generator,
    predictor: Predictor | None,
    tally: Tally,
) -> None:
    """Paste portraits where they overlap little, look for faces, and add the counts to the tally.

    The largest go first. A portrait that does not fit is left out.

    Args:
        canvas: picture to paste into.
        portraits: portraits to paste.
        sides: side of each in the canvas, in pixels.
        generator: source of positions.
        predictor: model that labels the faces, or None.
        tally: counts to add to.
    """
    places: list[tuple[Box, Portrait]] = []
    for side, portrait in sorted(zip(sides, portraits, strict=True), key=lambda pair: -pair[0]):
        if side > min(canvas.size):
            continue
        for _ in range(200):
            x = int(generator.integers(0, canvas.width - side + 1))
            y = int(generator.integers(0, canvas.height - side + 1))
            box: Box = (x, y, x + side, y + side)
            # The smaller portrait of two is the one that is pasted now.
            if all(_shared(box, other) <= _OVERLAP * side * side for other, _ in places):
                canvas.paste(
                    portrait.picture.resize((side, side), Image.Resampling.LANCZOS), (x, y)
                )
                places.append((box, portrait))
                break
    found = find_faces(canvas, CROP)
    tally.pictures += 1
    tally.faces += len(places)
    for box, portrait in places:
        hit = next((face for face in found if _shows(face, portrait, box)), None)
        if hit is None:
            continue
        found.remove(hit)
        tally.found += 1
        if portrait.male is not None and (again := judge(canvas, hit, predictor)) is not None:
            tally.judged += 1
            tally.alike += (again >= 0.5) == (portrait.male >= 0.5)
    tally.false += len(found)


def _shows(face: Face, portrait: Portrait, place: Box) -> bool:
    """Return whether the intersection over union of a box and a pasted face's is at least half."""
    scale = (place[2] - place[0]) / portrait.picture.width
    own = portrait.face
    left, top = place[0] + own.left * scale, place[1] + own.top * scale
    pasted = (left, top, left + own.width * scale, top + own.height * scale)
    found = (face.left, face.top, face.left + face.width, face.top + face.height)
    both = _shared(pasted, found)
    return both >= 0.5 * (own.width * own.height * scale**2 + face.width * face.height - both)


def _shared(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


if __name__ == "__main__":
    run_command(main)
