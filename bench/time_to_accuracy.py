"""Measure whether and how soon recipes best and fast beat recipe paper and the study's notebook.

Trains with each on the same images, one after the other, each in its own process, and evaluates it
on the test split after each epoch of fine-tuning, with the clock stopped. Time runs from the start
of training to the calibrated model; it includes compilation and validation, but not imports. The
notebook (bench/notebook.py) trains on the validation split too, because it looks at the test split
after each epoch. The default is the hard sample at the study's size, on which all but best take
half an hour or more on two cores; --images shortens this. On a small data set one split proves
little: --split-seeds gives the mean over several.
Pictures are taken whole, whatever image.face says.

    python -m bench.time_to_accuracy --weights ../shared/weights/mobilenet_1_0_224_tf_no_top.h5
    python -m bench.time_to_accuracy --recipes best fast notebook --weights ...
    python -m bench.time_to_accuracy --folder ../shared/faces --split-seeds 0 1 2 3 4 --weights ...
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bench.hard_sample import make_hard_sample
from facegender.data.preprocessing import write_split
from facegender.data.processed import ProcessedSplit
from facegender.data.raw_manifest import build_manifest
from facegender.data.splits import split_at_random
from facegender.evaluation.metrics import classification_metrics
from facegender.params import Params, load_params
from facegender.runtime.entry_points import run_command
from tools.compose_params import compose

_RECIPES = ("best", "paper", "fast", "notebook")
_SEED = 42


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=3686, help="images of the hard sample (3686)")
    parser.add_argument("--folder", type=Path, help="class folders to use instead")
    parser.add_argument("--split-seeds", type=int, nargs="+", default=[_SEED])
    parser.add_argument("--weights", default="imagenet", help="imagenet, or a file (imagenet)")
    parser.add_argument("--recipes", nargs="+", choices=_RECIPES, default=_RECIPES[:2])
    parser.add_argument(
        "-S", dest="changes", action="append", default=[], help="a parameter of all: NAME=VALUE"
    )
    parser.add_argument("--run", choices=_RECIPES, help=argparse.SUPPRESS)
    parser.add_argument("--processed", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        parts = {
            name: ProcessedSplit(args.processed / name) for name in ("train", "validation", "test")
        }
        if args.run == "notebook":
            done = run_notebook(parts, args.weights)
        else:
            done = train(args.run, parts, args.weights, args.changes)
        print(json.dumps(done))
        return

    results: dict[str, list[dict[str, float]]] = {recipe: [] for recipe in args.recipes}
    for seed in args.split_seeds:
        with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
            sizes = {recipe: image_size(recipe, args.changes) for recipe in args.recipes}
            processed = make_data(Path(folder), args.folder, args.images, seed, set(sizes.values()))
            curves: dict[str, list[tuple[float, float]]] = {}
            for recipe in args.recipes:
                result, curves[recipe] = run(
                    recipe, processed / str(sizes[recipe]), args.weights, args.changes
                )
                results[recipe].append(result)
                show(f"{recipe}, split {seed}", result)
        for ours, other in pairs(args.recipes):
            show_when_reached(ours, curves[ours], other, results[other][-1])
    means = {recipe: average(rows) for recipe, rows in results.items()}
    if len(args.split_seeds) > 1:
        for recipe, mean in means.items():
            show(f"{recipe}, mean", mean)
    for ours, other in pairs(args.recipes):
        one, two = means[ours], means[other]
        print(f"{ours} / {other}, seconds: {one['seconds'] / two['seconds']:.3f}")
        print(f"{ours} - {other}, accuracy: {one['accuracy'] - two['accuracy']:+.4f}")


def pairs(recipes: list[str]) -> list[tuple[str, str]]:
    """Return the recipes best and fast, each with every other recipe."""
    return [(a, b) for a in ("best", "fast") if a in recipes for b in recipes if b != a]


def composed_params(recipe: str, *changes: str) -> Params:
    with tempfile.TemporaryDirectory() as folder:
        composed = Path(folder) / "params.yaml"
        compose(composed, f"recipe={recipe}", *changes)
        return load_params(composed)


def image_size(recipe: str, changes: list[str]) -> int:
    # The notebook takes the study's size, as recipe paper does.
    name = "paper" if recipe == "notebook" else recipe
    return composed_params(name, *changes).image.size


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    return {metric: statistics.mean(row[metric] for row in rows) for metric in rows[0]}


def show(name: str, result: Mapping[str, float]) -> None:
    values = (f"{metric} {value:.4f}" for metric, value in result.items())
    print(f"{name}: {', '.join(values)}", flush=True)


def show_when_reached(
    ours: str, curve: list[tuple[float, float]], other: str, result: Mapping[str, float]
) -> None:
    """Print when a recipe first had the accuracy that the other one ended with."""
    reached = [seconds for seconds, accuracy in curve if accuracy >= result["accuracy"]]
    if reached:
        ratio = reached[0] / result["seconds"]
        print(f"{ours} has the accuracy of {other} at {reached[0]:.0f} s, {ratio:.3f} of its time")
    else:
        print(f"{ours} never has the accuracy of {other}")


def make_data(folder: Path, raw: Path | None, images: int, seed: int, sizes: set[int]) -> Path:
    """Split a folder, or the hard sample, and preprocess it for each image size."""
    if raw is None:
        raw = folder / "raw"
        make_hard_sample(raw, images, seed=_SEED)
    manifest = build_manifest(raw, **composed_params("best").split.classes.model_dump())
    parts = split_at_random(manifest, test_fraction=0.3, validation_fraction=0.15, seed=seed)
    for size, (name, part) in itertools.product(sizes, parts.items()):
        write_split(part, raw, folder / "processed" / str(size) / name, size=size, name=name)
    return folder / "processed"


def run(
    recipe: str, processed: Path, weights: str, changes: list[str]
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Train and judge in a new process, so that no recipe warms another's caches."""
    options = ["--processed", str(processed), "--weights", weights]
    options += [word for change in changes for word in ("-S", change)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.time_to_accuracy", "--run", recipe, *options],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result, curve = json.loads(done.stdout.splitlines()[-1])
    return result, curve


def train(
    recipe: str, parts: Mapping[str, ProcessedSplit], weights: str, changes: list[str]
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Train by a recipe as the stage does, and judge the model and its int8 export.

    Returns:
        The final figures, and the seconds and accuracy after each epoch of fine-tuning.
    """
    from facegender.inference import export
    from facegender.inference.litert import load_litert
    from facegender.model.saved_model import predict_arrays
    from facegender.training import train as training
    from facegender.training.calibration import calibrate

    params = composed_params(recipe, f"model.weights={weights}", *changes)
    network = training.new_network(params)
    epochs = params.train.head_epochs + params.train.epochs
    curve: list[tuple[float, float]] = []
    start = time.perf_counter()

    def now() -> dict[str, float]:
        return judge(parts["test"], predict_arrays(network.inference(), parts["test"].batches(32)))

    def report(epoch: int, metrics: dict[str, float], ended: int) -> None:
        nonlocal start
        stopped = time.perf_counter()
        values = ", ".join(f"{name} {metrics[name]:.4f}" for name in ("val_loss", "val_accuracy"))
        if epoch >= params.train.head_epochs:
            curve.append((stopped - start, now()["accuracy"]))
            values += f", test accuracy {curve[-1][1]:.4f}"
        progress(recipe, epoch, epochs, stopped - start, values)
        start += time.perf_counter() - stopped

    result = training.train_network(
        network, parts["train"], parts["validation"], params.train, on_epoch=report, verbose=0
    )
    slope, intercept = 1.0, 0.0
    if params.train.calibrate:
        slope, intercept = calibrate(network, parts["validation"])
    seconds = time.perf_counter() - start

    kept = result.history[result.history["epoch"] == result.kept_epoch].iloc[0]
    validation = {name: float(kept[name]) for name in ("val_accuracy", "val_loss")}
    model, test = network.inference(slope, intercept), parts["test"]
    probabilities = predict_arrays(model, test.batches(32))
    calibration = export.representative_images(
        parts["train"], params.export.calibration_images, params.export.seed
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model_int8.tflite"
        path.write_bytes(export.convert(model, calibration)[1])
        int8 = export.exported_metrics(
            path, load_litert(path, threads=1), test, probabilities, threshold=0.5, batch_size=32
        )
    measured = {**judge(test, probabilities), "int8_accuracy": int8["accuracy"]}
    return {"seconds": seconds, **validation, **measured}, curve


def run_notebook(
    parts: Mapping[str, ProcessedSplit], weights: str
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Train the notebook on all images outside the test split, and judge it on the test split."""
    from bench import notebook
    from facegender.model.saved_model import predict_arrays

    curve: list[tuple[float, float]] = []

    def report(epoch: int, passed: float, accuracy: float) -> None:
        curve.append((passed, accuracy))
        progress("notebook", epoch, notebook.EPOCHS, passed, f"test accuracy {accuracy:.4f}")

    model, test = notebook.train(parts, weights, on_epoch=report), parts["test"]
    probabilities = predict_arrays(model, test.batches(32))
    return {"seconds": curve[-1][0], **judge(test, probabilities)}, curve


def judge(test: ProcessedSplit, probabilities: np.ndarray) -> dict[str, float]:
    metrics = classification_metrics(test.labels, probabilities, threshold=0.5)
    return {name: metrics[name] for name in ("accuracy", "loss", "ece")}


def progress(name: str, epoch: int, epochs: int, seconds: float, values: str) -> None:
    # On stderr, because stdout holds the results.
    print(f"{name} {epoch}/{epochs} at {seconds:.0f} s: {values}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
