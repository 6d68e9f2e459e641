"""Trains on one and on two devices of this process, and prints both; run as a program.

The devices are two CPUs that TensorFlow makes of this machine's: it must not have begun yet.
"""

import json
import sys
from pathlib import Path
from typing import Any

import tensorflow as tf

from facegender.params import Train, load_params
from facegender.processed import Part
from facegender.training import train_network
from tests.compose import ROOT
from tests.networks import small_network


def train(part: Part, recipe: Train, strategy: tf.distribute.Strategy) -> dict[str, Any]:
    network = small_network(strategy, seed=recipe.seed, batch_norm=recipe.batch_norm)
    result = train_network(network, part, part, recipe, strategy=strategy, verbose=0)
    model = network.inference()
    answers = model.predict_on_batch(part.read(range(4)))
    return {"history": result.history.to_dict("list"), "answers": answers[:, 0].tolist()}


def main() -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    recipe = load_params(ROOT / "params.yaml").train.model_copy(
        update=json.loads(sys.argv[2], object_hook=_frozen)
    )
    part = Part(Path(sys.argv[1]))
    print(json.dumps([train(part, recipe, way) for way in (tf.distribute.get_strategy(), two)]))


def _frozen(content: dict[str, Any]) -> Any:
    still = load_params(ROOT / "params.yaml").train.augmentation.model_copy(
        update={"zoom": 0, "width_shift": 0, "height_shift": 0, "horizontal_flip": False}
    )
    return {"augmentation": still, **content}


if __name__ == "__main__":
    main()
