"""Whether recipe best reaches more than recipe paper, and in what part of its time.

Trains by both on the same images, one after the other, each in a process of its own, and judges
each on the test part when it has ended. Time runs from the start of training to the calibrated
model, with compilation and validation, without imports. By default on the hard sample at the
study's size, where recipe paper takes an hour on two cores; --images makes both shorter alike.
Of a small set, one split says little: --split-seeds gives the mean over several.

    python -m bench.time_to_accuracy --weights ../shared/weights/mobilenet_1_0_224_tf_no_top.h5
    python -m bench.time_to_accuracy --folder ../shared/faces --split-seeds 0 1 2 3 4 --weights ...
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from bench.hard_sample import make_hard_sample
from facegender.command import run_command
from facegender.manifest import build_manifest
from facegender.params import load_params
from facegender.preprocessing import write_part
from facegender.splits import split_at_random
from tests.compose import compose

_RECIPES = ("best", "paper")
_SEED = 42


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=3686, help="of the hard sample (3686)")
    parser.add_argument("--folder", type=Path, help="class folders of images in its place")
    parser.add_argument("--split-seeds", type=int, nargs="+", default=[_SEED])
    parser.add_argument("--weights", default="imagenet", help="imagenet, or a file (imagenet)")
    parser.add_argument("--recipes", nargs="+", choices=_RECIPES, default=_RECIPES)
    parser.add_argument(
        "-S", dest="changes", action="append", default=[], help="a parameter of all: NAME=VALUE"
    )
    parser.add_argument("--run", choices=_RECIPES, help=argparse.SUPPRESS)
    parser.add_argument("--processed", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(train(args.run, args.processed, args.weights, args.changes)))
        return

    results: dict[str, list[dict[str, float]]] = {recipe: [] for recipe in args.recipes}
    for seed in args.split_seeds:
        with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
            processed = make_data(Path(folder), args.folder, args.images, seed)
            for recipe in args.recipes:
                results[recipe].append(run(recipe, processed, args.weights, args.changes))
                show(f"{recipe}, split {seed}", results[recipe][-1])
    means = {recipe: average(rows) for recipe, rows in results.items()}
    if len(args.split_seeds) > 1:
        for recipe, mean in means.items():
            show(f"{recipe}, mean", mean)
    if len(means) == len(_RECIPES):
        best, paper = (means[recipe] for recipe in _RECIPES)
        print(f"best / paper, seconds: {best['seconds'] / paper['seconds']:.3f}")
        print(f"best - paper, accuracy: {best['accuracy'] - paper['accuracy']:+.4f}")


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    return {metric: statistics.mean(row[metric] for row in rows) for metric in rows[0]}


def show(name: str, result: Mapping[str, float]) -> None:
    values = (f"{metric} {value:.4f}" for metric, value in result.items())
    print(f"{name}: {', '.join(values)}", flush=True)


def make_data(folder: Path, raw: Path | None, images: int, seed: int) -> Path:
    """Split and preprocess a folder, or the hard sample, for the image size of recipe best."""
    if raw is None:
        raw = folder / "raw"
        make_hard_sample(raw, images, seed=_SEED)
    manifest = build_manifest(raw, female=["female"], male=["male"], ignore=[])
    parts = split_at_random(manifest, test_fraction=0.3, validation_fraction=0.15, seed=seed)
    for name, part in parts.items():
        write_part(part, raw, folder / "processed" / name, size=224, name=name)
    return folder / "processed"


def run(recipe: str, processed: Path, weights: str, changes: list[str]) -> dict[str, float]:
    """Train and judge in a process of its own, so that neither recipe warms the other's caches."""
    options = ["--processed", str(processed), "--weights", weights]
    options += [word for change in changes for word in ("-S", change)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.time_to_accuracy", "--run", recipe, *options],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def train(recipe: str, processed: Path, weights: str, changes: list[str]) -> dict[str, float]:
    """Train by a recipe as the stage does, and judge the model on the test part."""
    from facegender import training
    from facegender.evaluation import classification_metrics
    from facegender.prediction import predict_arrays
    from facegender.processed import Part

    with tempfile.TemporaryDirectory() as folder:
        composed = Path(folder) / "params.yaml"
        compose(composed, f"recipe={recipe}", f"model.weights={weights}", *changes)
        params = load_params(composed)
    parts = {name: Part(processed / name) for name in ("train", "validation", "test")}
    network = training.new_network(params)
    epochs = params.train.head_epochs + params.train.epochs
    start = time.perf_counter()

    def report(epoch: int, metrics: dict[str, float], ended: int) -> None:
        passed = time.perf_counter() - start
        values = ", ".join(f"{name} {metrics[name]:.4f}" for name in ("val_loss", "val_accuracy"))
        # On stderr: the results have stdout to themselves.
        print(f"{recipe} {epoch}/{epochs} at {passed:.0f} s: {values}", file=sys.stderr)

    result = training.train_network(
        network, parts["train"], parts["validation"], params.train, on_epoch=report, verbose=0
    )
    temperature = 1.0
    if params.train.calibrate:
        temperature = training.calibrate(network, parts["validation"])
    seconds = time.perf_counter() - start

    test = parts["test"]
    probabilities = predict_arrays(network.inference(temperature), test.batches(32))
    metrics = classification_metrics(
        test.labels, probabilities, threshold=0.5, bootstrap_samples=200, seed=_SEED
    )
    kept = result.history[result.history["epoch"] == result.kept_epoch].iloc[0]
    return {
        "seconds": seconds,
        "val_accuracy": kept["val_accuracy"],
        "val_loss": kept["val_loss"],
        "accuracy": metrics["accuracy"],
        "loss": metrics["loss"],
        "ece": metrics["ece"],
    }


if __name__ == "__main__":
    run_command(main)
