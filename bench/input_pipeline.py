"""Measure what reading batches from processed data costs, compared with batches in memory.

Prints images per second of `fit` with augmentation on a processed split and on constant tensors of
the same shape, in turns in one process, and their ratio; then of reading and batching alone, with a
warm page cache. Makes its own data and removes them.

    python -m bench.input_pipeline
"""

import argparse
import tempfile
from pathlib import Path

import keras
import tensorflow as tf

from bench.common import make_raw, measure, new_network, report
from facegender.data.preprocessing import write_split
from facegender.data.processed import ProcessedSplit
from facegender.params import load_params
from facegender.runtime.entry_points import run_command
from facegender.training.augmentation import augmentation_layers
from facegender.training.batches import make_batches


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000, help="images in the split")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--alpha", type=float, default=1.0, help="width of MobileNet")
    parser.add_argument("--batch-size", type=int, default=32, help="images a batch")
    parser.add_argument("--steps", type=int, default=4, help="batches in a call of fit")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    args = parser.parse_args()
    params = load_params(Path("params.yaml"))
    layers = augmentation_layers(params.train.augmentation, 1)
    network = new_network(args.size, args.alpha, dropout=params.model.dropout).training(layers)
    network.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))

    with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
        manifest = make_raw(Path(folder) / "raw", args.images)
        write_split(
            manifest, Path(folder) / "raw", Path(folder) / "part", size=args.size, name="train"
        )
        part = ProcessedSplit(Path(folder) / "part")
        constant = next(iter(make_batches(part, args.batch_size)))

        def from_part() -> int:
            return fit(make_batches(part, args.batch_size, shuffle_seed=1).take(args.steps))

        def from_memory() -> int:
            return fit(tf.data.Dataset.from_tensors(constant).repeat(args.steps))

        def fit(batches: tf.data.Dataset) -> int:
            network.fit(batches, shuffle=False, verbose=0)
            return args.steps * args.batch_size

        def read() -> int:
            epochs = make_batches(part, args.batch_size, shuffle_seed=1, epochs=range(3))
            return sum(len(images) for images, _ in epochs)

        runs = {"fit on data": from_part, "fit on constants": from_memory, "reading alone": read}
        for run in runs.values():  # the first call of each traces its graph
            run()
        report(measure(runs, args.rounds), [("fit on data", "fit on constants")])


if __name__ == "__main__":
    run_command(main)
