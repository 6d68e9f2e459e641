"""Whether recipe best reaches more than recipe paper, and in what part of its time.

Trains by both on the same images, one after the other, each in a process of its own, and judges
each on the test part when it has ended. Time runs from the start of training to the calibrated
model, with compilation and validation, without imports. By default on the hard sample at the
study's size, where recipe paper takes an hour on two cores; --images makes both shorter alike.

    python -m bench.time_to_accuracy --weights ../shared/weights/mobilenet_1_0_224_tf_no_top.h5
    python -m bench.time_to_accuracy --processed data/processed
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
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
    parser.add_argument("--processed", type=Path, help="a `data/processed` in its place")
    parser.add_argument("--weights", default="imagenet", help="imagenet, or a file (imagenet)")
    parser.add_argument("--recipes", nargs="+", choices=_RECIPES, default=_RECIPES)
    parser.add_argument(
        "-S", dest="changes", action="append", default=[], help="a parameter of all: NAME=VALUE"
    )
    parser.add_argument("--run", choices=_RECIPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(train(args.run, args.processed, args.weights, args.changes)))
        return

    with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
        processed = args.processed or make_data(Path(folder), args.images)
        results = {}
        for recipe in args.recipes:
            options = ["--processed", str(processed), "--weights", args.weights]
            options += [word for change in args.changes for word in ("-S", change)]
            done = subprocess.run(
                [sys.executable, "-m", "bench.time_to_accuracy", "--run", recipe, *options],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results[recipe] = json.loads(done.stdout.splitlines()[-1])
            values = (f"{name} {value:.4f}" for name, value in results[recipe].items())
            print(f"{recipe:<6} {', '.join(values)}", flush=True)
    if len(results) == len(_RECIPES):
        best, paper = (results[recipe] for recipe in _RECIPES)
        print(f"best / paper, seconds: {best['seconds'] / paper['seconds']:.3f}")
        print(f"best - paper, accuracy: {best['accuracy'] - paper['accuracy']:+.4f}")


def make_data(folder: Path, images: int) -> Path:
    """Draw the hard sample and take it through split and preprocess, for recipe best's size."""
    raw, processed = folder / "raw", folder / "processed"
    make_hard_sample(raw, images, seed=_SEED)
    manifest = build_manifest(raw, female=["female"], male=["male"], ignore=[])
    parts = split_at_random(manifest, test_fraction=0.3, validation_fraction=0.15, seed=_SEED)
    for name, part in parts.items():
        write_part(part, raw, processed / name, size=224, name=name)
    return processed


def train(recipe: str, processed: Path, weights: str, changes: list[str]) -> dict[str, float]:
    """Train by a recipe as the stage does, and judge the model on the test part."""
    from facegender import model, training
    from facegender.calibration import fit_temperature
    from facegender.evaluation import classification_metrics
    from facegender.prediction import predict_arrays
    from facegender.processed import Part

    with tempfile.TemporaryDirectory() as folder:
        composed = Path(folder) / "params.yaml"
        compose(composed, f"recipe={recipe}", f"model.weights={weights}", *changes)
        params = load_params(composed)
    parts = {name: Part(processed / name) for name in ("train", "validation", "test")}
    training.make_deterministic(params.train.seed)
    network = model.build_network(
        image_size=params.image.size,
        alpha=params.model.alpha,
        weights=params.model.weights,
        weights_sha256=params.model.weights_sha256,
        dropout=params.model.dropout,
        batch_norm=params.train.batch_norm,
        batch_norm_momentum=params.train.batch_norm_momentum,
        seed=params.train.seed,
    )
    # A line an epoch, on stderr: the results have stdout to themselves.
    epochs = params.train.head_epochs + params.train.epochs
    start = time.perf_counter()

    def report(epoch: int, metrics: dict[str, float], ended: int) -> None:
        passed = time.perf_counter() - start
        values = ", ".join(f"{name} {metrics[name]:.4f}" for name in ("val_loss", "val_accuracy"))
        print(f"{recipe} {epoch}/{epochs} at {passed:.0f} s: {values}", file=sys.stderr)

    result = training.train_network(
        network, parts["train"], parts["validation"], params.train, on_epoch=report, verbose=0
    )
    temperature = 1.0
    if params.train.calibrate:
        validation = parts["validation"]
        logits = predict_arrays(network.training([]), validation.batches(32))
        temperature = fit_temperature(validation.labels, logits)
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
