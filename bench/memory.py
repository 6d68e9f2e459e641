"""Measure whether memory grows with the number of images.

Prints the peak memory of preprocessing and of training at two numbers of images, each in its own
process, and their ratio. Training reads every batch of an epoch and fits a small network on some of
them. Makes its own data (28 KB an image at 96 pixels) and removes them. Linux only.

    python -m bench.memory
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import joblib

from bench.common import make_raw, new_network, peak_memory
from facegender.data.manifest import read_manifest, write_table
from facegender.data.preprocessing import write_split
from facegender.runtime.entry_points import run_command

_BATCH = 32
_JOBS = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs=2, default=[6000, 60000], help="how many")
    parser.add_argument("--size", type=int, default=96, help="pixels a side")
    parser.add_argument("--steps", type=int, default=20, help="batches to fit on")
    parser.add_argument("--step", choices=_STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(_STEPS[args.step](args)))
        return

    peaks: list[dict[str, float]] = []
    for images in args.images:
        with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
            peaks.append({})
            for step in _STEPS:
                options = (
                    f"--step {step} --images {images} 0 --size {args.size} --steps {args.steps}"
                )
                done = subprocess.run(
                    [sys.executable, "-m", "bench.memory", "--folder", folder, *options.split()],
                    stdout=subprocess.PIPE,
                    check=True,
                )
                peaks[-1] |= json.loads(done.stdout)
    few, many = args.images
    for name, before in peaks[0].items():
        after = peaks[1][name]
        print(
            f"{name:<32} {before:6,.0f} MB at {few:,} images, {after:6,.0f} MB at {many:,}: "
            f"ratio {after / before:.2f}"
        )


def make(args: argparse.Namespace) -> dict[str, float]:
    manifest = make_raw(args.folder / "raw", args.images[0])
    write_table(manifest, args.folder / "manifest.csv")
    return {}


def preprocess(args: argparse.Namespace) -> dict[str, float]:
    manifest = read_manifest(args.folder / "manifest.csv")
    raw, part = args.folder / "raw", args.folder / "part"
    write_split(manifest, raw, part, size=args.size, name="train", jobs=_JOBS)
    # joblib reuses its processes; several tasks for each make sure that each one answers.
    workers = dict(joblib.Parallel(_JOBS)(joblib.delayed(peak)() for _ in range(16 * _JOBS)))
    own = peak()[1]
    return {
        "preprocessing": own + sum(workers.values()),
        "  main process": own,
        f"  largest of {len(workers)} workers": max(workers.values()),
    }


def train(args: argparse.Namespace) -> dict[str, float]:
    import keras  # with TensorFlow, which preprocessing must not count

    from facegender.data.processed import ProcessedSplit
    from facegender.params import load_params
    from facegender.training.augmentation import augmentation_layers
    from facegender.training.batches import make_batches

    augmentation = load_params(Path("params.yaml")).train.augmentation
    layers = augmentation_layers(augmentation, 1)
    network = new_network(args.size, 0.25, dropout=0.2).training(layers)
    network.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    part = ProcessedSplit(args.folder / "part")
    read = sum(len(images) for images, _ in make_batches(part, _BATCH, shuffle_seed=1))
    if read != args.images[0]:
        raise AssertionError(f"read {read} of {args.images[0]} images")
    batches = make_batches(part, _BATCH, shuffle_seed=1).take(args.steps)
    network.fit(batches, shuffle=False, verbose=0)
    return {"training": peak()[1]}


def peak() -> tuple[int, float]:
    """Return this process's id, and its largest resident memory so far in MB."""
    return os.getpid(), peak_memory(os.getpid())


_STEPS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "make": make,
    "preprocess": preprocess,
    "train": train,
}


if __name__ == "__main__":
    run_command(main)
