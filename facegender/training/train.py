"""Training: augmentation, the head, fine-tuning, the epoch to keep."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from sklearn.utils.class_weight import compute_class_weight

from facegender.data.processed import ProcessedSplit
from facegender.errors import UserError
from facegender.model.network import Network, build_network, predict_arrays, set_trainable
from facegender.params import Augmentation, Params, Train
from facegender.training.batches import make_batches, make_feature_batches, weigh
from facegender.training.calibration import fit_temperature
from facegender.training.checkpoints import Checkpoint, training_digest
from facegender.training.strategy import Share, distribute

_log = logging.getLogger(__name__)

HISTORY_COLUMNS = ["epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"]
SPEED_COLUMNS = ["epoch", "seconds", "images_per_second"]

# Called with an epoch's number, from 1, its metrics, and the milliseconds since 1970 of its end.
OnEpoch = Callable[[int, dict[str, float], int], None]


@dataclass(frozen=True)
class Training:
    """What training leaves behind, besides the weights of the kept epoch in the network.

    Attributes:
        history: a row an epoch, HISTORY_COLUMNS; the same bytes for the same seed.
        speed: a row an epoch, SPEED_COLUMNS; differs from run to run.
        kept_epoch: the epoch whose weights are kept, from 1; 0 if none was run.
    """

    history: pd.DataFrame
    speed: pd.DataFrame
    kept_epoch: int


def make_deterministic(seed: int) -> None:
    """Seed Python, NumPy and Keras, and have TensorFlow use deterministic kernels only.

    Keras also numbers layers anew, for the names that it counts up are saved with a model.
    """
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


def inputs_digest(params: Params, parts: Sequence[ProcessedSplit]) -> str:
    """Return a SHA-256, as 64 hexadecimal digits, of all that decides what a training gives."""
    weights = Path(params.model.weights)
    return training_digest(
        params=params.model_dump_json(),
        files=[
            *(part.directory / name for part in parts for name in ProcessedSplit.FILES),
            *([weights] if weights.is_file() else []),
        ],
        code=Path(__file__).parents[1],
    )


def new_network(params: Params, strategy: tf.distribute.Strategy | None = None) -> Network:
    """Return the network that parameters describe, after `make_deterministic`.

    Args:
        params: all of them.
        strategy: of `open_strategy`, to have the weights on all its devices.

    Raises:
        UserError: as `build_network` does.
    """
    make_deterministic(params.train.seed)
    with (strategy or tf.distribute.get_strategy()).scope():
        return _build(params)


def _build(params: Params) -> Network:
    return build_network(
        image_size=params.image.size,
        alpha=params.model.alpha,
        weights=params.model.weights,
        weights_sha256=params.model.weights_sha256,
        dropout=params.model.dropout,
        test_time_flip=params.model.test_time_flip,
        batch_norm=params.train.batch_norm,
        batch_norm_momentum=params.train.batch_norm_momentum,
        seed=params.train.seed,
        mixed_precision=params.train.mixed_precision,
    )


def calibrate(network: Network, validation: ProcessedSplit) -> float:
    """Return the temperature at which the network's answers on the validation split fit best."""
    logits = predict_arrays(network.logits(), validation.batches(32))
    return fit_temperature(validation.labels, logits)


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
    if ranges.rotation:
        layers.append(
            keras.layers.RandomRotation(
                ranges.rotation, fill_mode="nearest", seed=seed + 3, name="rotation"
            )
        )
    if ranges.zoom:
        layers.append(
            keras.layers.RandomZoom(ranges.zoom, fill_mode="nearest", seed=seed + 2, name="zoom")
        )
    if ranges.brightness:
        layers.append(
            keras.layers.RandomBrightness(
                ranges.brightness, value_range=(-1, 1), seed=seed + 4, name="brightness"
            )
        )
    if ranges.contrast:
        layers.append(
            keras.layers.RandomContrast(
                ranges.contrast, value_range=(-1, 1), seed=seed + 5, name="contrast"
            )
        )
    return layers


def train_network(
    network: Network,
    train: ProcessedSplit,
    validation: ProcessedSplit,
    recipe: Train,
    *,
    strategy: tf.distribute.Strategy | None = None,
    on_epoch: OnEpoch = lambda epoch, metrics, ended: None,
    checkpoint: Checkpoint | None = None,
    verbose: int = 2,
) -> Training:
    """Train the head alone, then fine-tune, and leave the network with the epoch to keep.

    The head learns from features that are computed once. Fine-tuning may begin on small images
    (Howard, Training Imagenet in 3 hours for 25 minutes, fast.ai 2018) and end on full ones.

    Chance (order, augmentation, dropout) is a function of the seed, the epoch and the step alone.
    With the rest from a checkpoint, training that was killed ends with the bits that it would have
    ended with.

    With several devices each computes a share of each batch, and draws chances of its own. Then
    BatchNorm, if it is trained, takes its statistics over the whole batch.

    Args:
        network: built for the images of the parts; its layers are trained in place.
        train: training split.
        validation: decides which epoch is best, by its loss.
        recipe: how to train.
        strategy: the one that the network was built with.
        on_epoch: called after each epoch, when it is in the checkpoint; and first for each that the
            checkpoint holds already.
        checkpoint: where to go on from, and where each epoch is kept; None does neither.
        verbose: as in Keras' `fit`: 1 draws a bar by step, 2 prints a line an epoch.

    Raises:
        UserError: recipe.fine_tune_from names no layer, or the batch cannot be divided among the
            devices.
    """
    strategy = strategy or tf.distribute.get_strategy()
    recipe = for_all_devices(recipe, strategy)
    set_trainable(network.trunk, recipe.fine_tune_from)
    network.set_replicated(strategy.num_replicas_in_sync > 1)
    with strategy.scope():
        augmentation = augmentation_layers(recipe.augmentation, recipe.seed)
    model = network.training(augmentation)
    passes, _ = _epoch_length(len(train), recipe)
    clock, best = _Clock(len(train)), _BestWeights(model)
    keeper = _Keeper(model, checkpoint or Checkpoint(None), clock, best, on_epoch)
    callbacks = [_Chance(model, strategy), clock, best, keras.callbacks.TerminateOnNaN(), keeper]
    small = recipe.small_image_size if recipe.small_epochs else None
    if keeper.done < recipe.head_epochs:
        _train_head(network, train, validation, recipe, strategy, small, callbacks, keeper, verbose)
    if recipe.epochs:
        if keeper.done <= recipe.head_epochs:
            # What the head reached by itself is where fine-tuning starts, not what it competes
            # with.
            best.restart()
        clock.images = passes * len(train)
        _fine_tune(model, train, validation, recipe, strategy, small, callbacks, keeper, verbose)
    if recipe.keep == "best" or not clock.history:
        best.restore()
        kept = best.epoch
    else:
        kept = clock.history[-1]["epoch"]
    network.set_replicated(False)
    if recipe.mixed_precision:
        network.set_float32()

    history = pd.DataFrame(clock.history, columns=HISTORY_COLUMNS)
    speed = pd.DataFrame(clock.speed, columns=SPEED_COLUMNS)
    return Training(history, speed, kept)


def _train_head(
    network: Network,
    train: ProcessedSplit,
    validation: ProcessedSplit,
    recipe: Train,
    strategy: tf.distribute.Strategy,
    size: int | None,
    callbacks: list[keras.callbacks.Callback],
    keeper: "_Keeper",
    verbose: int,
) -> None:
    """Train the head on features of the frozen trunk, each computed once, without augmentation."""
    extract = network.features()
    inputs, val_inputs = (
        # Half precision halves what a large set takes of memory, and costs the head nothing.
        extract.predict(make_batches(part, recipe.batch_size, size=size), verbose=0).astype(
            "float16"
        )
        for part in (train, validation)
    )
    schedule = keras.optimizers.schedules.CosineDecay(
        recipe.head_learning_rate, recipe.head_epochs * math.ceil(len(train) / recipe.batch_size)
    )
    head = _trainable(network.head, strategy)

    def train_share(share: Share) -> tf.data.Dataset:
        epochs = range(keeper.done, recipe.head_epochs)
        return _weighed(
            make_feature_batches(
                inputs,
                train.labels,
                recipe.batch_size,
                shuffle_seed=recipe.seed,
                epochs=epochs,
                share=share,
            ),
            train,
            recipe,
        )

    def validation_share(share: Share) -> tf.data.Dataset:
        return make_feature_batches(val_inputs, validation.labels, recipe.batch_size, share=share)

    with strategy.scope():
        _compile(head, recipe, schedule)
        _make_variables(head, strategy, (val_inputs[:1], validation.labels[:1, None]))
        keeper.restore_optimizer(head)
        head.fit(
            distribute(strategy, train_share),
            validation_data=distribute(strategy, validation_share),
            initial_epoch=keeper.done,
            epochs=recipe.head_epochs,
            steps_per_epoch=math.ceil(len(train) / recipe.batch_size),
            validation_steps=math.ceil(len(validation) / recipe.batch_size),
            shuffle=False,  # the dataset shuffles itself
            callbacks=callbacks,
            verbose=verbose,
        )


def _fine_tune(
    model: keras.Model,
    train: ProcessedSplit,
    validation: ProcessedSplit,
    recipe: Train,
    strategy: tf.distribute.Strategy,
    small: int | None,
    callbacks: list[keras.callbacks.Callback],
    keeper: "_Keeper",
    verbose: int,
) -> None:
    """Train the whole, first on images of `small` pixels a side, then on those of the parts."""
    passes, steps = _epoch_length(len(train), recipe)
    warmup = recipe.warmup_epochs * steps
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup else recipe.learning_rate,
        warmup_target=recipe.learning_rate if warmup else None,
        warmup_steps=warmup,
        decay_steps=max(1, recipe.epochs * steps - warmup),
        # A decay to the whole of the rate is none at all.
        alpha=1.0 if recipe.schedule == "constant" else 0.0,
    )
    model = _trainable(model, strategy)
    done = max(0, keeper.done - recipe.head_epochs)
    with strategy.scope():
        _compile(model, recipe, schedule, average_steps=recipe.ema_epochs * steps)
        example = validation.read(np.arange(1)), validation.labels[:1, None]
        _make_variables(model, strategy, example)
        if done:
            keeper.restore_optimizer(model)
    if recipe.ema_epochs:
        # Before the others, which then judge and keep the averaged weights.
        callbacks = [_Averages(averaged=done > 0), *callbacks]
    if recipe.early_stopping_patience:
        # Before the last, which does not keep the epoch that training stops at.
        patience = recipe.early_stopping_patience
        stopper = _EarlyStopping(patience, keeper.clock.history, after=recipe.head_epochs)
        callbacks = [*callbacks[:-1], stopper, keeper]
    first_full = min(recipe.small_epochs, recipe.epochs) if small else 0
    for size, epochs in ((small, range(first_full)), (None, range(first_full, recipe.epochs))):
        epochs = range(max(done, epochs.start), epochs.stop)
        if not epochs or model.stop_training:
            continue

        def train_share(
            share: Share, epochs: range = epochs, size: int | None = size
        ) -> tf.data.Dataset:
            batches = make_batches(
                train,
                recipe.batch_size,
                shuffle_seed=recipe.seed,
                epochs=range(epochs.start * passes, epochs.stop * passes),
                size=size,
                share=share,
            )
            return _weighed(batches, train, recipe)

        def validation_share(share: Share) -> tf.data.Dataset:
            return make_batches(validation, recipe.batch_size, share=share)

        with strategy.scope():
            model.fit(
                distribute(strategy, train_share),
                validation_data=distribute(strategy, validation_share),
                initial_epoch=recipe.head_epochs + epochs.start,
                epochs=recipe.head_epochs + epochs.stop,
                steps_per_epoch=steps,
                validation_steps=math.ceil(len(validation) / recipe.batch_size),
                shuffle=False,  # the dataset shuffles itself
                callbacks=callbacks,
                verbose=verbose,
            )


def for_all_devices(recipe: Train, strategy: tf.distribute.Strategy) -> Train:
    """Return the recipe with the batch size of all devices together.

    Raises:
        UserError: it cannot be divided among them.
    """
    devices = strategy.num_replicas_in_sync
    if recipe.batch_per_device:
        return recipe.model_copy(update={"batch_size": recipe.batch_size * devices})
    if recipe.batch_size % devices:
        raise UserError(
            f"train.batch_size {recipe.batch_size} cannot be divided among {devices} devices: make "
            "it a multiple, or set train.batch_per_device."
        )
    return recipe


class _AcrossWorkers(keras.Model):
    """A model that `fit` can train on several machines.

    There Keras averages what a step returns over the first axis, and scalars have none.
    """

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Train on a batch, and return the metrics, each of shape (1,)."""
        return {name: value[None] for name, value in super().train_step(data).items()}

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Test on a batch, and return the metrics, each of shape (1,)."""
        return {name: value[None] for name, value in super().test_step(data).items()}


def _trainable(model: keras.Model, strategy: tf.distribute.Strategy) -> keras.Model:
    """Return a model of the same layers that `fit` can train by the strategy.

    It is made outside of the strategy's scope, for otherwise Keras would first have all workers
    average a batch of uint8 images, and fail.
    """
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return _AcrossWorkers(model.inputs[0], model.outputs[0], name=model.name)
    if strategy.num_replicas_in_sync > 1:
        return keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    return model


def _make_variables(
    model: keras.Model, strategy: tf.distribute.Strategy, example: tuple[np.ndarray, np.ndarray]
) -> None:
    """Make the variables of the optimizer and the metrics of a model that was compiled.

    Else the first step of `fit` would make them: TensorFlow then traces the step twice, which takes
    seconds, and on several devices fails, for they cannot be brought together in the conditional
    branch where it happens (keras-team/keras issue 19246).
    """
    model.optimizer.build(model.trainable_variables)
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("ERROR")  # one step without a graph is slow, as it would warn
    strategy.run(model.test_step, args=(example,))
    logger.setLevel(level)


def _epoch_length(images: int, recipe: Train) -> tuple[int, int]:
    """Return how often an epoch passes over the images, and its steps.

    A handful of images makes a handful of steps, too few to learn in: such an epoch goes over them
    again, each time augmented anew.
    """
    steps = math.ceil(images / recipe.batch_size)
    passes = max(1, math.ceil(recipe.min_steps_per_epoch / steps))
    return passes, passes * steps


def _compile(
    model: keras.Model,
    recipe: Train,
    schedule: keras.optimizers.schedules.LearningRateSchedule,
    average_steps: float = 0,
) -> None:
    """Compile a model that ends in logits, averaging weights over some steps (0: not at all)."""
    optimizer = keras.optimizers.get(
        {
            "class_name": recipe.optimizer,
            "config": {
                "learning_rate": schedule,
                "weight_decay": recipe.weight_decay or None,
                "use_ema": bool(average_steps),
                "ema_momentum": 1 - 1 / max(1.0, average_steps),
            },
        }
    )
    model.compile(
        optimizer,
        keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing),
        # Probability 0.5 is logit 0.
        metrics=[keras.metrics.BinaryAccuracy("accuracy", threshold=0.0)],
    )


def _weighed(batches: tf.data.Dataset, part: ProcessedSplit, recipe: Train) -> tf.data.Dataset:
    """Return the batches with weights by class, if the recipe wants them."""
    if recipe.class_weights == "none":
        return batches
    return weigh(batches, compute_class_weight("balanced", classes=np.array([0, 1]), y=part.labels))


class _Chance(keras.callbacks.Callback):
    """Makes what random layers draw a function of their seed, the device, the epoch and the step.

    Keras' layers count their draws from the first epoch on, so that one who begins at a later epoch
    would draw other numbers; and on all devices they would draw the same.
    """

    def __init__(self, whole: keras.Model, strategy: tf.distribute.Strategy) -> None:
        super().__init__()
        self._strategy = strategy
        states = [item for item in whole.variables if item.name == "seed_generator_state"]
        self._states = [(state, int(keras.ops.convert_to_numpy(state)[0])) for state in states]

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Begin the epoch's numbers; the layers count on from there, one a step."""
        for state, seed in self._states:
            copies = self._strategy.experimental_local_results(state.value)
            resolver = self._strategy.cluster_resolver
            first = resolver.task_id * len(copies) if resolver is not None else 0
            for device, copy in enumerate(copies, first):
                # A zero at the end changes nothing: the first device draws what a single one does.
                entropy = (seed, epoch, device)
                copy.assign(np.random.SeedSequence(entropy).generate_state(2, np.uint32))


class _Averages(keras.callbacks.SwapEMAWeights):
    """Has the averaged weights in the model between epochs, and at the start if told so."""

    def __init__(self, *, averaged: bool) -> None:
        super().__init__(swap_on_epoch=True)
        # Keras' own flag: a checkpoint holds the weights as they are between epochs.
        self._ema_weights_in_model = averaged


class _EarlyStopping(keras.callbacks.EarlyStopping):
    """Counts the epochs of all fine-tuning, not only those since images changed or a restart."""

    def __init__(self, patience: int, history: list[dict[str, Any]], *, after: int) -> None:
        super().__init__(patience=patience, mode="min")
        self._history = history
        self._after = after  # the last epoch of the head

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Count the epochs that are past."""
        super().on_train_begin(logs)
        for row in self._history:
            if row["epoch"] > self._after:
                self.on_epoch_end(row["epoch"] - 1, row)


class _BestWeights(keras.callbacks.Callback):
    """Keeps the weights of the epoch with the lowest validation loss, whatever model is trained.

    Keras' own callbacks keep those of the model in `fit`, but the head is trained by itself.

    Attributes:
        weights: those that are kept.
        loss: their validation loss.
        epoch: the epoch whose weights are kept, from 1; 0 for the first weights.
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
        """Go on from the kept weights, and have any later epoch take their place."""
        self.restore()
        self.loss = math.inf

    def restore(self) -> None:
        """Put the kept weights back."""
        self._whole.set_weights(self.weights)


class _Clock(keras.callbacks.Callback):
    """Keeps the metrics of each epoch, with its learning rate, and its speed apart from them."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images  # an epoch
        self.history: list[dict[str, Any]] = []
        self.speed: list[dict[str, Any]] = []
        self.ended: list[int] = []  # milliseconds since 1970

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
        self.ended.append(time.time_ns() // 1_000_000)
        self.speed.append(
            {
                "epoch": epoch + 1,
                "seconds": round(self._seconds, 3),
                "images_per_second": round(self.images / self._seconds, 1),
            }
        )


class _Keeper(keras.callbacks.Callback):
    """Goes on from a checkpoint, and keeps each epoch in it; the last of the callbacks.

    Keras' BackupAndRestore keeps one model and its optimizer, from the start to the end of one
    `fit`. A training here is up to three, of two models; and it is more: the best weights, the
    history, whether the weights in the model are the averaged ones.

    Attributes:
        clock: what it keeps of the epochs.
        done: the last epoch that the checkpoint held at the start, from 1; 0 if there was none.
    """

    def __init__(
        self,
        whole: keras.Model,
        checkpoint: Checkpoint,
        clock: _Clock,
        best: _BestWeights,
        on_epoch: OnEpoch,
    ) -> None:
        """Put back all but the state of the optimizer, which does not exist yet."""
        super().__init__()
        self._whole, self._checkpoint, self._on_epoch = whole, checkpoint, on_epoch
        self.clock, self._best = clock, best
        if checkpoint.saved is not None:
            notes = checkpoint.saved.notes
            clock.history, clock.speed = notes["history"], notes["speed"]
            clock.ended = notes["ended"]
            whole.set_weights(self._saved("weights"))
            best.weights = self._saved("best")
            best.loss, best.epoch = notes["best_loss"], notes["best_epoch"]
        self.done = clock.history[-1]["epoch"] if clock.history else 0
        if self.done:
            _log.info("training goes on after epoch %d, where it was interrupted", self.done)
        for row, ended in zip(clock.history, clock.ended, strict=True):
            self._report(row, ended)

    def restore_optimizer(self, model: keras.Model) -> None:
        """Put back the state of the optimizer of the model that the checkpoint's epoch trained."""
        if self.done:
            saved = self._saved("optimizer")
            for variable, value in zip(model.optimizer.variables, saved, strict=True):
                variable.assign(value)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Keep the epoch, then tell of it."""
        # Where training stops, Keras does more before `fit` ends: such an epoch is done again.
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
                    "history": self.clock.history,
                    "speed": self.clock.speed,
                    "ended": self.clock.ended,
                    "best_loss": self._best.loss,
                    "best_epoch": self._best.epoch,
                },
            )
        self._report(self.clock.history[-1], self.clock.ended[-1])

    def _report(self, row: dict[str, Any], ended: int) -> None:
        metrics = dict(row)
        self._on_epoch(metrics.pop("epoch"), metrics, ended)

    def _saved(self, group: str) -> list[np.ndarray]:
        assert self._checkpoint.saved is not None  # noqa: S101 - a bug, not bad input
        arrays = self._checkpoint.saved.arrays
        count = sum(name.startswith(f"{group}.") for name in arrays)
        return [arrays[f"{group}.{number}"] for number in range(count)]
