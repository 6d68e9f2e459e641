"""How many faces are found, how many boxes are false, and how well a model labels them.

Pastes each portrait of a folder of class folders at several sizes, makes group photos of 2 to 12
faces, and draws pictures without a face. With a model, prints its accuracy on the portraits as they
are, judged whole and judged by face.

    python -m bench.faces ../shared/faces --model models/model.tflite
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from facegender.data.image_files import find_images
from facegender.data.images import decode_picture
from facegender.faces.crop import find_faces
from facegender.faces.detector import Face
from facegender.faces.settings import FaceCrop
from facegender.inference.litert import load_litert
from facegender.inference.prediction import predict_images
from facegender.runtime.entry_points import run_command

_CROP = FaceCrop(margin=0.25, align=False, min_score=0.75, min_size=24)
_SIDE = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("faces", type=Path, help="folder of female/ and male/")
    parser.add_argument("--model", type=Path, help="a .tflite file that was trained on crops")
    parser.add_argument("--groups", type=int, default=100, help="group photos to make")
    args = parser.parse_args()
    paths = [args.faces / path for path in find_images(args.faces)]
    portraits = [decode_picture(path) for path in paths]
    generator = np.random.default_rng(0)
    for divisor in (1, 3, 6, 10):
        side = _SIDE // divisor
        rates = [find_pasted([portrait], [side], generator) for portrait in portraits]
        show(f"1/{divisor} of {_SIDE} pixels", rates)
    rates = []
    for _ in range(args.groups):
        chosen = generator.choice(len(portraits), generator.integers(2, 13))
        sides = generator.integers(150, 400, len(chosen))
        rates.append(find_pasted([portraits[index] for index in chosen], list(sides), generator))
    show("group photos", rates)
    empty = [find_faces(background(generator), _CROP) for _ in range(100)]
    print(f"{'100 pictures without a face':<28} {sum(map(len, empty))} false boxes")
    if args.model:
        compare(args.model, paths)


def find_pasted(
    portraits: list[Image.Image], sides: list[int], generator: np.random.Generator
) -> tuple[int, int, int]:
    """Return how many faces were pasted, how many were found, and how many boxes are false."""
    canvas = background(generator)
    places: list[tuple[int, int, int]] = []
    for portrait, side in zip(portraits, sides, strict=True):
        for _ in range(100):
            x, y = (int(value) for value in generator.integers(0, _SIDE - side + 1, 2))
            if all(max(abs(x - a), abs(y - b)) >= max(side, other) for a, b, other in places):
                canvas.paste(portrait.resize((side, side)), (x, y))
                places.append((x, y, int(side)))
                break
    found = find_faces(canvas, _CROP)
    hit = {place for place in places for face in found if _inside(face, *place)}
    return len(places), len(hit), len(found) - len(hit)


def _inside(face: Face, left: int, top: int, side: int) -> bool:
    x, y = face.left + face.width / 2 - left, face.top + face.height / 2 - top
    return 0.2 * side < x < 0.8 * side and 0.1 * side < y < 0.8 * side


def background(generator: np.random.Generator) -> Image.Image:
    """Return soft shapes with noise."""
    coarse = Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    shapes = np.asarray(coarse.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
    noisy = shapes + generator.normal(0, 8, shapes.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def show(name: str, rates: list[tuple[int, int, int]]) -> None:
    """Print the sums of what `find_pasted` returned."""
    faces, found, false = (sum(column) for column in zip(*rates, strict=True))
    print(f"{name:<28} {found} of {faces} found, {false} false boxes, {len(rates)} pictures")


def compare(model: Path, paths: list[Path]) -> None:
    """Print the accuracy of a model, judging whole pictures and judging the largest face."""
    predictor = load_litert(model)
    sources: list[tuple[str, bytes | Path]] = [(path.parent.name, path) for path in paths]
    for which in ("whole", "largest"):
        answers = list(predict_images([predictor], sources, faces=which))  # type: ignore[arg-type]
        right = sum(answer.label == answer.image for answer in answers)
        print(f"{which:<28} {right / len(paths):.4f} right of {len(paths)}")


if __name__ == "__main__":
    run_command(main)
