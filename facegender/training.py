"""Training: augmentation, the two phases, the best epoch."""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from sklearn.utils.class_weight import compute_class_weight

from facegender.batches import make_batches
from facegender.model import Network, set_trainable
from facegender.params import Augmentation, Train
from facegender.processed import Part

HISTORY_COLUMNS = ["epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"]
SPEED_COLUMNS = ["epoch", "seconds", "images_per_second"]


@dataclass(frozen=True)
class Training:
    """What training leaves behind, besides the weights of the best epoch in the network.

    Attributes:
        history: a row an epoch, HISTORY_COLUMNS; the same bytes for the same seed.
        speed: a row an epoch, SPEED_COLUMNS; differs from run to run.
        best_epoch: the epoch with the lowest validation loss, from 1; 0 if none was run.
    """

    history: pd.DataFrame
    speed: pd.DataFrame
    best_epoch: int


def make_deterministic(seed: int) -> None:
    """Seed Python, NumPy and Keras, and have TensorFlow use deterministic kernels only.

    Keras also numbers layers anew, for the names that it counts up are saved with a model.
    """
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


def augmentation_layers(ranges: Augmentation, seed: int) -> list[keras.layers.Layer]:
    """Return Keras layers that change float32 images (n, h, w, 3) at random while training."""
    layers: list[keras.layers.Layer] = []
    if ranges.horizontal_flip:
        layers.append(keras.layers.RandomFlip("horizontal", seed=seed, name="flip"))
    if ranges.width_shift or ranges.height_shift:
        layers.append(
            keras.layers.RandomTranslation(
                ranges.height_shift,
                ranges.width_shift,
                fill_mode="nearest",
                seed=seed + 1,
                name="shift",
            )
        )
    if ranges.zoom:
        layers.append(
            keras.layers.RandomZoom(ranges.zoom, fill_mode="nearest", seed=seed + 2, name="zoom")
        )
    return layers


def train_network(
    network: Network,
    train: Part,
    validation: Part,
    recipe: Train,
    *,
    on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, metrics: None,
    verbose: int = 2,
) -> Training:
    """Train the head alone, then fine-tune, and leave the network with its best epoch's weights.

    Args:
        network: built for the images of the parts; its layers are trained in place.
        train: training part.
        validation: decides which epoch is best, by its loss.
        recipe: how to train.
        on_epoch: called after each epoch with its number, from 1, and its metrics.
        verbose: as in Keras' `fit`: 1 draws a bar by step, 2 prints a line an epoch.

    Raises:
        UserError: recipe.fine_tune_from names no layer.
    """
    clock = _Clock(len(train))
    epochs_done = 0
    with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
        best = Path(folder) / "best.weights.h5"
        network.training.save_weights(best)
        # One callback for both phases, so that the best epoch of all wins.
        callbacks = [
            clock,
            keras.callbacks.ModelCheckpoint(
                best, monitor="val_loss", save_best_only=True, save_weights_only=True
            ),
            keras.callbacks.TerminateOnNaN(),
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: on_epoch(epoch + 1, dict(logs))
            ),
        ]
        for phase in _phases(recipe):
            if not phase.epochs:
                continue
            set_trainable(
                network.base, phase.fine_tune_from, batch_norm=recipe.batch_norm == "train"
            )
            steps = math.ceil(len(train) / recipe.batch_size)
            _compile(network.training, recipe, phase, steps)
            stop_early = (
                [keras.callbacks.EarlyStopping(patience=recipe.early_stopping_patience)]
                if recipe.early_stopping_patience
                else []
            )
            epochs = range(epochs_done, epochs_done + phase.epochs)
            fitted = network.training.fit(
                make_batches(train, recipe.batch_size, shuffle_seed=recipe.seed, epochs=epochs),
                validation_data=make_batches(validation, recipe.batch_size),
                initial_epoch=epochs.start,
                epochs=epochs.stop,
                steps_per_epoch=steps,
                shuffle=False,  # the dataset shuffles itself
                class_weight=_class_weights(recipe, train),
                callbacks=[*callbacks, *stop_early],
                verbose=verbose,
            )
            epochs_done += len(fitted.epoch)
        network.training.load_weights(best)

    history = pd.DataFrame(clock.history, columns=HISTORY_COLUMNS)
    speed = pd.DataFrame(clock.speed, columns=SPEED_COLUMNS)
    ranked = history.dropna(subset="val_loss").sort_values("val_loss", kind="stable")
    best_epoch = 0 if ranked.empty else int(ranked["epoch"].iloc[0])
    return Training(history, speed, best_epoch)


@dataclass(frozen=True)
class _Phase:
    epochs: int
    learning_rate: float
    fine_tune_from: str
    warmup_epochs: int


def _phases(recipe: Train) -> list[_Phase]:
    return [
        _Phase(recipe.head_epochs, recipe.head_learning_rate, "none", 0),
        _Phase(recipe.epochs, recipe.learning_rate, recipe.fine_tune_from, recipe.warmup_epochs),
    ]


def _compile(model: keras.Model, recipe: Train, phase: _Phase, steps: int) -> None:
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if phase.warmup_epochs else phase.learning_rate,
        warmup_target=phase.learning_rate if phase.warmup_epochs else None,
        warmup_steps=phase.warmup_epochs * steps,
        decay_steps=max(1, (phase.epochs - phase.warmup_epochs) * steps),
        # A decay to the whole of the rate is none at all.
        alpha=1.0 if recipe.schedule == "constant" else 0.0,
    )
    optimizer = keras.optimizers.get(
        {"class_name": recipe.optimizer, "config": {"learning_rate": schedule}}
    )
    model.compile(
        optimizer,
        keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing),
        # The model ends in logits: probability 0.5 is logit 0.
        metrics=[keras.metrics.BinaryAccuracy("accuracy", threshold=0.0)],
    )


def _class_weights(recipe: Train, part: Part) -> dict[int, float] | None:
    if recipe.class_weights == "none":
        return None
    classes = np.array([0, 1])
    weights = compute_class_weight("balanced", classes=classes, y=part.labels)
    return dict(zip(classes.tolist(), weights.tolist(), strict=True))


class _Clock(keras.callbacks.Callback):
    """Keeps the metrics of each epoch, with its learning rate, and its speed apart from them."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images
        self.history: list[dict[str, Any]] = []
        self.speed: list[dict[str, Any]] = []

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Start the epoch's clock."""
        self._start = time.perf_counter()
        self._seconds = math.nan

    def on_test_begin(self, logs: dict[str, float] | None = None) -> None:
        """Stop the clock: validation is no part of the training speed."""
        self._seconds = time.perf_counter() - self._start

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Record the epoch, and add its learning rate for the callbacks that follow."""
        logs = logs if logs is not None else {}
        logs["learning_rate"] = float(
            keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)
        )
        self.history.append({"epoch": epoch + 1, **logs})
        self.speed.append(
            {
                "epoch": epoch + 1,
                "seconds": round(self._seconds, 3),
                "images_per_second": round(self.images / self._seconds, 1),
            }
        )
