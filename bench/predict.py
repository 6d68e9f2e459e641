"""Measure what decoding costs `facegender predict`, and how long the command takes to start.

Prints the images per second of the runtime alone, of `predict` on a folder of JPEGs and of Keras'
forward pass, in turns in one process; and those of one thread, in CPU time, by the size of batches.
Then it prints the CPU time of whole commands, minus that of `python -c pass`. With a photo of a
face, it does so for the command that has to find the face, too, and compares `predict` on photos of
12 megapixels, into which the face is pasted, with decoding and the passes of the networks alone. By
default the model is MobileNet 1.0 for 224 pixels with random weights, and the pictures are drawn.

    python -m bench.predict --face ../shared/faces/female/00.jpg
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
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from bench.backdrops import photo
from bench.common import CROP, measure, new_network, report
from facegender.data.image_files import find_images
from facegender.data.images import decode_image, decode_picture
from facegender.data.sources.sample import CLASSES, draw_attributes, render
from facegender.faces import detector
from facegender.faces.crop import find_faces
from facegender.inference.export import convert, median_seconds
from facegender.inference.litert import load_litert
from facegender.inference.loading import keras_predictor
from facegender.inference.model_crop import write_crop
from facegender.inference.prediction import predict_images
from facegender.inference.predictor import BATCH_SIZE, Predictor
from facegender.model.interpreter import open_interpreter
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
        starts = [("", Path(folder), paths[0].absolute())]
        if args.face:
            crops = Path(folder) / "crops"
            shutil.copytree(exported.parent, crops / "models")
            (crops / ".dvc").mkdir()
            write_crop(crops / "models" / exported.name, CROP)
            compare_faces(crops / "models" / exported.name, args.face, args.rounds)
            starts.append((", find its face", crops, args.face.absolute()))
        compare_starts(starts)


def compare_faces(exported: Path, face: Path, rounds: int) -> None:
    """Print the photos a second of `predict`, and of decoding and the bare networks; one thread."""
    jpegs = [large_photo(face, side) for side in (2400, 1200, 600, 300)]
    predictor, networks = load_litert(exported), Networks()
    pixels = np.zeros((1, predictor.size, predictor.size, 3), np.uint8)
    passes = [(jpeg, networks.record(jpeg)) for jpeg in jpegs]

    def bare() -> int:
        for jpeg, inputs in 4 * passes:
            Image.open(io.BytesIO(jpeg)).convert("RGB")
            networks.repeat(inputs)
            predictor.predict(pixels)
        return 4 * len(passes)

    whole, parts = "predict, 12 megapixels", "decoding, bare networks"
    runs = {
        whole: lambda: len(list(predict_images([predictor], [("", jpeg) for jpeg in 4 * jpegs]))),
        parts: bare,
    }
    measure(runs, 1)  # warms up
    report(measure(runs, rounds), [(whole, parts)])


def large_photo(face: Path, side: int) -> bytes:
    """Return a JPEG of 12 megapixels: a photo with a portrait of `side` pixels pasted into it."""
    picture = photo(np.random.default_rng(0), 4000, 3000)
    picture.paste(Image.open(face).convert("RGB").resize((side, side)), (700, 300))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class Networks:
    """The detector's network, once for each shape of its input."""

    def __init__(self) -> None:
        self._by_shape: dict[tuple[int, ...], Any] = {}

    def record(self, jpeg: bytes) -> list[np.ndarray]:
        """Return the inputs that the detector gives to the network for a photo."""
        inputs: list[np.ndarray] = []

        def recording(interpreter: Any, image: np.ndarray, scale: float) -> np.ndarray:
            inputs.append(image[None].astype(np.float32) / 127.5 - 1)
            return detect(interpreter, image, scale)

        detect = detector._detect
        with patch.object(detector, "_detect", recording):
            find_faces(decode_picture(jpeg)[0], CROP)
        return inputs

    def repeat(self, inputs: list[np.ndarray]) -> None:
        """Pass the inputs through the network."""
        for pixels in inputs:
            if pixels.shape not in self._by_shape:
                opened = self._by_shape[pixels.shape] = open_interpreter(detector._network())
                opened.resize_tensor_input(opened.get_input_details()[0]["index"], pixels.shape)
                opened.allocate_tensors()
            interpreter = self._by_shape[pixels.shape]
            interpreter.set_tensor(interpreter.get_input_details()[0]["index"], pixels)
            interpreter.invoke()


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


def compare_starts(pictures: list[tuple[str, Path, Path]], pairs: int = 11) -> None:
    """Print the CPU seconds of commands.

    Args:
        pictures: suffix for the command's name, clone that has only a model, and picture.
    """
    facegender = str(Path(sys.executable).with_name("facegender"))
    _, root, picture = pictures[0]
    model = ["--model", "models/model.tflite"]
    commands = {
        "facegender --help": (root, [facegender, "--help"]),
        "predict one picture with --model": (root, [facegender, "predict", str(picture), *model]),
    } | {
        f"predict one picture{name}": (clone, [facegender, "predict", str(path)])
        for name, clone, path in pictures
    }
    for name, (clone, command) in commands.items():
        extra = [
            cpu_seconds(command, clone) - cpu_seconds([sys.executable, "-c", "pass"], root)
            for _ in range(pairs)
        ]
        low, high = min(extra), max(extra)
        print(f"{name:<34} {statistics.median(extra):8.3f} s of CPU ({low:.3f} to {high:.3f})")


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
