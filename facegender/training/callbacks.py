"""Keras callbacks of a training: random draws, averaged weights, best epoch, checkpoints."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from facegender.errors import UserError
from facegender.training.checkpoints import Checkpoint

_log = logging.getLogger(__name__)


# Called with an epoch's number, from 1, its metrics, and its end in milliseconds since 1970.
OnEpoch = Callable[[int, dict[str, float], int], None]


class SeedPerEpoch(keras.callbacks.Callback):
    """Reseeds random layers so that each draw depends only on seed, device, epoch and step.

    Keras' layers count their draws from the first epoch on, so a resumed training would draw other
    numbers. They also draw the same on all devices.
    """

    def __init__(self, whole: keras.Model, strategy: tf.distribute.Strategy) -> None:
        super().__init__()
        self._strategy = strategy
        states = [item for item in whole.variables if item.name == "seed_generator_state"]
        self._states = [(state, int(keras.ops.convert_to_numpy(state)[0])) for state in states]

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Set the epoch's seeds; the layers count on from there, one a step."""
        for state, seed in self._states:
            copies = self._strategy.experimental_local_results(state.value)
            resolver = self._strategy.cluster_resolver
            first = resolver.task_id * len(copies) if resolver is not None else 0
            for device, copy in enumerate(copies, first):
                # NumPy ignores a zero at the end: the first device draws what a single one does.
                entropy = (seed, epoch, device)
                copy.assign(np.random.SeedSequence(entropy).generate_state(2, np.uint32))


class SwapEma(keras.callbacks.SwapEMAWeights):
    """Puts the averaged weights into the model between epochs; `averaged` if they are there now."""

    def __init__(self, *, averaged: bool) -> None:
        super().__init__(swap_on_epoch=True)
        # Keras' own flag: a checkpoint holds the weights as they are between epochs.
        self._ema_weights_in_model = averaged

    def keep_averages(self) -> None:
        """Leave the averaged weights in the model although `fit` ends before its last epoch.

        When `fit` ends, Keras assigns the optimizer's averages to the model. Between epochs they
        hold the raw weights, and Keras swaps them back only after the last epoch.
        """
        self._finalize_ema_values()


class EarlyStopping(keras.callbacks.EarlyStopping):
    """Counts all epochs of fine-tuning, also those before a restart or a change of image size."""

    def __init__(
        self,
        patience: int,
        history: list[dict[str, Any]],
        *,
        after: int,
        averages: SwapEma | None,
    ) -> None:
        super().__init__(patience=patience, mode="min")
        self._averages = averages
        self._history = history
        self._after = after  # the last epoch of the head

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Count earlier epochs."""
        super().on_train_begin(logs)
        for row in self._history:
            if row["epoch"] > self._after:
                self.on_epoch_end(row["epoch"] - 1, row)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Count the epoch; if it is the last one, keep the averaged weights."""
        super().on_epoch_end(epoch, logs)
        if self.model.stop_training and self._averages is not None:
            self._averages.keep_averages()


class FailOnDivergence(keras.callbacks.Callback):
    """Ends a training whose loss is not finite, before the checkpoint is written."""

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Remember the epoch."""
        self._epoch = epoch + 1

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Check the training loss."""
        self._check("loss", logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Check the validation loss."""
        self._check("val_loss", logs)

    def _check(self, name: str, logs: dict[str, float] | None) -> None:
        loss = (logs or {}).get(name, 0.0)
        if not np.isfinite(loss).all():
            raise UserError(
                f"Training diverged in epoch {self._epoch}: {name} is {loss}. The checkpoint of "
                "the previous epoch is kept. Lower train.learning_rate or "
                "train.head_learning_rate."
            )


class BestWeights(keras.callbacks.Callback):
    """Keeps all weights of the epoch with the lowest validation loss.

    Keras' own callbacks keep only those of the model in `fit`, which may be the head alone.

    Attributes:
        weights: weights that are kept.
        loss: their validation loss.
        epoch: epoch whose weights are kept, from 1; 0 for the initial weights.
    """

    def __init__(self, whole: keras.Model) -> None:
        super().__init__()
        self._whole = whole
        self.weights = whole.get_weights()
        self.loss = math.inf
        self.epoch = 0

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Keep the weights if they are better; NaN is not."""
        loss = (logs or {}).get("val_loss", math.nan)
        if loss < self.loss:
            self.weights, self.loss, self.epoch = self._whole.get_weights(), loss, epoch + 1

    def restart(self) -> None:
        """Put the kept weights back, and let any later epoch replace them."""
        self.restore()
        self.loss = math.inf

    def restore(self) -> None:
        """Put the kept weights back."""
        self._whole.set_weights(self.weights)


class EpochRecorder(keras.callbacks.Callback):
    """Records the metrics, learning rate and speed of each epoch."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images  # per epoch
        self.history: list[dict[str, Any]] = []
        self.speed: list[dict[str, Any]] = []
        self.ended: list[int] = []  # milliseconds since 1970

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Start the epoch's clock."""
        self._start = time.perf_counter()
        self._seconds = math.nan

    def on_test_begin(self, logs: dict[str, float] | None = None) -> None:
        """Stop the clock: the training speed excludes validation."""
        self._seconds = time.perf_counter() - self._start

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Record the epoch, and add its learning rate for the callbacks that follow."""
        logs = logs if logs is not None else {}
        logs["learning_rate"] = float(
            keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)
        )
        self.history.append({"epoch": epoch + 1, **logs})
        self.ended.append(time.time_ns() // 1_000_000)
        self.speed.append(
            {
                "epoch": epoch + 1,
                "seconds": round(self._seconds, 3),
                "images_per_second": round(self.images / self._seconds, 1),
            }
        )


class CheckpointEpochs(keras.callbacks.Callback):
    """Resumes from a checkpoint, and saves each epoch to it; the last of the callbacks.

    Keras' BackupAndRestore saves one model and its optimizer during one `fit`. A training here is
    up to three calls of `fit`, of two models, and also needs the best weights and the history.

    Attributes:
        recorder: metrics and speed of the epochs.
        done: last epoch in the checkpoint at the start, from 1; 0 without one.
    """

    def __init__(
        self,
        whole: keras.Model,
        checkpoint: Checkpoint,
        recorder: EpochRecorder,
        best: BestWeights,
        on_epoch: OnEpoch,
    ) -> None:
        """Restore everything but the state of the optimizer, which does not exist yet."""
        super().__init__()
        self._whole, self._checkpoint, self._on_epoch = whole, checkpoint, on_epoch
        self.recorder, self._best = recorder, best
        if checkpoint.saved is not None:
            notes = checkpoint.saved.notes
            recorder.history, recorder.speed = notes["history"], notes["speed"]
            recorder.ended = notes["ended"]
            whole.set_weights(self._saved("weights"))
            best.weights = self._saved("best")
            best.loss, best.epoch = notes["best_loss"], notes["best_epoch"]
        self.done = recorder.history[-1]["epoch"] if recorder.history else 0
        if self.done:
            _log.info("training goes on after epoch %d, where it was interrupted", self.done)
        for row, ended in zip(recorder.history, recorder.ended, strict=True):
            self._report(row, ended)

    def restore_optimizer(self, model: keras.Model) -> None:
        """Restore the optimizer; `model` is the one that the checkpoint's epoch trained."""
        if self.done:
            saved = self._saved("optimizer")
            for variable, value in zip(model.optimizer.variables, saved, strict=True):
                variable.assign(value)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Save the epoch, then report it."""
        # Keras does more before `fit` ends at the epoch that stops training, so a resumed training
        # must repeat that epoch.
        if not self.model.stop_training:
            optimizer = self.model.optimizer.variables
            groups = {
                "weights": self._whole.get_weights(),
                "best": self._best.weights,
                "optimizer": [keras.ops.convert_to_numpy(variable) for variable in optimizer],
            }
            self._checkpoint.write(
                {
                    f"{group}.{number}": array
                    for group, arrays in groups.items()
                    for number, array in enumerate(arrays)
                },
                {
                    "history": self.recorder.history,
                    "speed": self.recorder.speed,
                    "ended": self.recorder.ended,
                    "best_loss": self._best.loss,
                    "best_epoch": self._best.epoch,
                },
            )
        self._report(self.recorder.history[-1], self.recorder.ended[-1])

    def _report(self, row: dict[str, Any], ended: int) -> None:
        metrics = dict(row)
        self._on_epoch(metrics.pop("epoch"), metrics, ended)

    def _saved(self, group: str) -> list[np.ndarray]:
        assert self._checkpoint.saved is not None  # noqa: S101 - a bug, not bad input
        arrays = self._checkpoint.saved.arrays
        count = sum(name.startswith(f"{group}.") for name in arrays)
        return [arrays[f"{group}.{number}"] for number in range(count)]
