"""Trains on one and on two devices of this process, and prints both; run as a program.

The devices are two CPUs that TensorFlow makes of this machine's: it must not have begun yet.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from facegender.data.processed import ProcessedSplit
from facegender.params import Train, load_params
from facegender.training.train import train_network
from tests.networks import pretrained, shallow_network, small_network
from tools.compose_params import ROOT


def train(
    part: ProcessedSplit, recipe: Train, strategy: tf.distribute.Strategy, weights: Path | None
) -> dict[str, Any]:
    settings: dict[str, Any] = {"seed": recipe.seed, "batch_norm": recipe.batch_norm}
    build = shallow_network
    if weights is not None:
        settings["weights"] = str(weights)
        build = small_network
    network = build(strategy, **settings, mixed_precision=recipe.mixed_precision)
    result = train_network(network, part, part, recipe, strategy=strategy, verbose=0)
    answers = network.inference().predict_on_batch(part.read(np.arange(4)))
    return {"history": result.history.to_dict("list"), "answers": answers[:, 0].tolist()}


def main() -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    still = {"zoom": 0, "width_shift": 0, "height_shift": 0, "horizontal_flip": False}
    usual = load_params(ROOT / "params.yaml").train
    augmentation = usual.augmentation.model_copy(update=still)
    recipe = usual.model_copy(update={"augmentation": augmentation, **json.loads(sys.argv[2])})
    part = ProcessedSplit(Path(sys.argv[1]))
    weights = pretrained(part, Path(sys.argv[3])) if recipe.batch_norm == "frozen" else None
    ways = (tf.distribute.get_strategy(), two)
    print(json.dumps([train(part, recipe, way, weights) for way in ways]))


if __name__ == "__main__":
    main()
