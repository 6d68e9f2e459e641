"""The small network of the tests. In a module of its own because it imports TensorFlow."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import keras
import pandas as pd
import tensorflow as tf

from facegender.data.processed import ProcessedSplit
from facegender.model import network as networks
from facegender.model.network import Network, build_network
from facegender.params import Train, load_params
from facegender.training import train as training
from facegender.training.callbacks import FailOnDivergence
from facegender.training.checkpoints import Checkpoint
from facegender.training.train import make_deterministic, train_network
from tools.compose_params import ROOT

# Keras collects garbage for each network. Searching all that TensorFlow's import left is slow.
gc.freeze()


def small_network(strategy: tf.distribute.Strategy | None = None, **changes: Any) -> Network:
    """Build an untrained network for images of 32 pixels, the same for the same arguments."""
    settings = {
        "image_size": 32,
        "alpha": 0.25,
        "weights": "none",
        "dropout": 0.0,
        "seed": 1,
        "batch_norm": "train",
        "batch_norm_momentum": 0.9,
    } | changes
    make_deterministic(settings["seed"])
    with (strategy or tf.distribute.get_strategy()).scope():
        return build_network(**settings)


def shallow_network(strategy: tf.distribute.Strategy | None = None, **changes: Any) -> Network:
    """Build a small network of MobileNet's first block, for tests of how one is trained.

    TensorFlow takes seconds to trace a training step of all thirteen.
    """
    whole = networks.mobilenet

    def first_block(*args: Any) -> keras.Model:
        base = whole(*args)
        features = keras.layers.GlobalAveragePooling2D()(base.get_layer("conv_pw_1_relu").output)
        return keras.Model(base.input, features, name=base.name)

    with patch.object(networks, "mobilenet", first_block):
        return small_network(strategy, **changes)


def pretrained(part: ProcessedSplit, path: Path) -> Path:
    """Write weights that have learnt a little, to go on from with BatchNorm frozen."""
    network = small_network()
    recipe = load_params(ROOT / "params.yaml").train
    recipe = recipe.model_copy(update={"epochs": 6, "min_steps_per_epoch": 10, "keep": "last"})
    train_network(network, part, part, recipe, verbose=0)
    network.base.save_weights(path)
    return path


@dataclass(frozen=True)
class Trained:
    bits: bytes  # of all weights
    history: pd.DataFrame
    speed: pd.DataFrame
    kept_epoch: int


def train_small(
    part: ProcessedSplit,
    recipe: Train,
    checkpoint: Checkpoint,
    on_step: Callable[[int], None] = lambda step: None,
    on_epoch: training.OnEpoch = lambda epoch, metrics, ended: None,
) -> Trained:
    """Train the shallow network on `part`, with `on_step` called at each of all steps, from 0."""
    network = shallow_network(dropout=0.2, seed=recipe.seed, batch_norm=recipe.batch_norm)
    steps = iter(range(10**9))
    original = FailOnDivergence.on_train_batch_end

    def stepping(self: Any, batch: int, logs: Any = None) -> None:
        original(self, batch, logs)
        on_step(next(steps))

    FailOnDivergence.on_train_batch_end = stepping
    try:
        result = train_network(
            network, part, part, recipe, checkpoint=checkpoint, on_epoch=on_epoch, verbose=0
        )
    finally:
        FailOnDivergence.on_train_batch_end = original
    weights = network.training([]).get_weights()
    bits = b"".join(weight.tobytes() for weight in weights)
    return Trained(bits, result.history, result.speed, result.kept_epoch)
