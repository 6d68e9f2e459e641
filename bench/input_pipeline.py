"""How much reading batches from data/processed costs against having them in memory.

Prints images per second of `fit` on the processed training part and on constant tensors of the
same shape, alternating in one process, and their ratio; and of reading and batching alone.

    make repro && make bench
"""

import argparse
import statistics
import time
from pathlib import Path

import keras
import tensorflow as tf

from facegender.batches import make_batches
from facegender.command import run_command
from facegender.model import build_network
from facegender.params import load_params
from facegender.processed import Part
from facegender.training import augmentation_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processed", type=Path, default=Path("data/processed/train"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    params = load_params(Path("params.yaml"))
    part, batch_size = Part(args.processed), params.train.batch_size
    network = build_network(
        image_size=params.image.size,
        alpha=params.model.alpha,
        weights="none",
        dropout=params.model.dropout,
        seed=1,
        batch_norm="train",
        batch_norm_momentum=0.9,
    ).training(augmentation_layers(params.train.augmentation, 1))
    network.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    steps = len(part) // batch_size
    constant = next(iter(make_batches(part, batch_size)))

    def read() -> tf.data.Dataset:
        return make_batches(part, batch_size, shuffle_seed=1).take(steps)

    def memory() -> tf.data.Dataset:
        return tf.data.Dataset.from_tensors(constant).repeat(steps)

    def speed(run: object) -> float:
        start = time.perf_counter()
        run()  # type: ignore[operator]
        return steps * batch_size / (time.perf_counter() - start)

    network.fit(memory(), verbose=0)
    rates: dict[str, list[float]] = {"processed": [], "memory": [], "reading": []}
    for _ in range(args.rounds):
        rates["processed"].append(speed(lambda: network.fit(read(), verbose=0)))
        rates["memory"].append(speed(lambda: network.fit(memory(), verbose=0)))
        rates["reading"].append(speed(lambda: sum(1 for _ in read())))
    middle = {name: statistics.median(values) for name, values in rates.items()}
    print(f"fit from data/processed  {middle['processed']:8.0f} images/s")
    print(f"fit on constant tensors  {middle['memory']:8.0f} images/s")
    print(f"ratio                    {middle['processed'] / middle['memory']:8.2f}")
    print(f"reading alone            {middle['reading']:8.0f} images/s")


if __name__ == "__main__":
    run_command(main)
