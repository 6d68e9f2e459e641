"""Measure what decoding costs `facegender predict`, and how long the command takes to start.

Prints the images per second of the runtime alone, of `predict` on a folder of JPEGs and of Keras'
forward pass, in turns in one process; and those of one thread, in CPU time, by the size of batches.
Then it prints the CPU time of whole commands, minus that of `python -c pass`; with a photo of a
face, also of the command that has to find the face. By default the model is MobileNet 1.0 for 224
pixels with random weights, and the pictures are drawn.

    python -m bench.predict
"""

import argparse
import io
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from bench.common import measure, new_network, report
from facegender.data.image_files import find_images
from facegender.data.images import decode_image
from facegender.data.sources.sample import CLASSES, draw_attributes, render
from facegender.faces.settings import FaceCrop
from facegender.inference.crop_file import write_crop
from facegender.inference.export import convert, median_seconds
from facegender.inference.litert import load_litert
from facegender.inference.loading import keras_predictor
from facegender.inference.prediction import predict_images
from facegender.inference.predictor import BATCH_SIZE, Predictor
from facegender.model.saved_model import load_model, save_model
from facegender.runtime.entry_points import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a .keras file, in place of random weights")
    parser.add_argument("--images", type=Path, help="a folder, in place of drawn JPEGs")
    parser.add_argument("--count", type=int, default=256, help="JPEGs to draw")
    parser.add_argument("--side", type=int, default=224, help="pixels a side of drawn JPEGs")
    parser.add_argument(
        "--flip", action="store_true", help="random weights: predict as recipe best"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--face", type=Path, help="a photo to find a face in, from the shell")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        images = args.images or draw_jpegs(Path(folder) / "images", args.count, args.side)
        paths = [images / path for path in find_images(images)]
        keras_model = load_model(
            args.model or random_model(Path(folder) / "model.keras", args.flip)
        )
        size = keras_predictor(keras_model).size
        pixels = np.stack([decode_image(path, size) for path in paths[:32]])
        (Path(folder) / ".dvc").mkdir()
        exported = Path(folder) / "models" / "model.tflite"
        exported.parent.mkdir()
        exported.write_bytes(convert(keras_model, pixels)[0])
        compare(exported, keras_predictor(keras_model), paths, pixels, args.rounds)
        compare_batches(exported, pixels, args.rounds)
        compare_starts(Path(folder), paths[0].absolute(), args.face and args.face.absolute())


def compare_batches(exported: Path, pixels: np.ndarray, rounds: int) -> None:
    """Print the images a second of CPU time of one thread, by size of batch."""
    batches = {size: pixels[:size] for size in (1, 2, 4, 8, 16, len(pixels)) if size <= len(pixels)}
    predictors = {size: load_litert(exported) for size in batches}
    rates: dict[int, list[float]] = {size: [] for size in batches}
    for _ in range(rounds + 1):
        for size, batch in batches.items():
            start = time.thread_time()
            passes = math.ceil(len(pixels) / size)
            for _ in range(passes):
                predictors[size].predict(batch)
            rates[size].append(passes * size / (time.thread_time() - start))
    for size, (_, *values) in rates.items():  # the first round warms up
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"one thread, batches of {size:<2} {statistics.median(values):8.1f} ({spread})")


def compare(
    exported: Path, by_keras: Predictor, paths: list[Path], pixels: np.ndarray, rounds: int
) -> None:
    """Print each speed, measured in turns."""
    cores = os.cpu_count() or 1
    together = load_litert(exported, threads=cores)
    apart = [load_litert(exported) for _ in range(cores)]
    sources = [(path.name, path) for path in paths]
    small = np.ascontiguousarray(np.resize(pixels, (BATCH_SIZE, *pixels.shape[1:])))

    def repeat(predictor: Predictor, batch: np.ndarray) -> int:
        passes = math.ceil(len(paths) / len(batch))
        for _ in range(passes):
            predictor.predict(batch)
        return passes * len(batch)

    forward = f"forward pass, {cores} threads"
    runs = {
        forward: lambda: repeat(together, small),
        "predict on a folder": lambda: len(list(predict_images(apart, sources))),
        "Keras' forward pass": lambda: repeat(by_keras, pixels),
    }
    measure(runs, 1)  # warms up
    report(measure(runs, rounds), [("predict on a folder", forward)])
    decoding = median_seconds(lambda: decode_image(paths[0], pixels.shape[1]))
    print(f"decoding, of one core    {1000 * decoding:8.2f} ms an image")


def compare_starts(root: Path, picture: Path, face: Path | None, pairs: int = 11) -> None:
    """Print the CPU seconds of commands, run in a clone that has only a model."""
    facegender = str(Path(sys.executable).with_name("facegender"))
    one = [facegender, "predict", str(picture)]
    commands = {
        "facegender --help": [facegender, "--help"],
        "predict one picture": one,
        "the same, with --model": [*one, "--model", "models/model.tflite"],
    }
    roots = dict.fromkeys(commands, root)
    if face:
        crops = "find a face and judge it"
        commands[crops], roots[crops] = [*one[:2], str(face)], root / "crops"
        shutil.copytree(root / "models", roots[crops] / "models")
        (roots[crops] / ".dvc").mkdir()
        crop = FaceCrop(margin=0.25, align=False, min_score=0.75, min_size=16)
        write_crop(roots[crops] / "models" / "model.tflite", crop)
    for name, command in commands.items():
        extra = [
            cpu_seconds(command, roots[name]) - cpu_seconds([sys.executable, "-c", "pass"], root)
            for _ in range(pairs)
        ]
        low, high = min(extra), max(extra)
        print(f"{name:<24} {statistics.median(extra):8.3f} s of CPU ({low:.3f} to {high:.3f})")


def cpu_seconds(command: list[str], folder: Path) -> float:
    """Run a command and return the CPU time that it took, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def draw_jpegs(folder: Path, count: int, side: int) -> Path:
    """Write pictures of the sample as JPEGs, and return their folder."""
    folder.mkdir()
    for number in range(count):
        attributes = draw_attributes(CLASSES[number % len(CLASSES)], number, seed=1)
        picture = Image.open(io.BytesIO(render(attributes, side))).convert("RGB")
        picture.save(folder / f"{number:05}.jpg", quality=90)
    return folder


def random_model(path: Path, flip: bool) -> Path:
    """Save an untrained MobileNet of the study's size, and return its path."""
    save_model(new_network(224, test_time_flip=flip).inference(), path)
    return path


if __name__ == "__main__":
    run_command(main)
