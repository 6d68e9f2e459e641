"""Training: augmentation, the head, fine-tuning, the epoch to keep."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from facegender.data.processed import ProcessedSplit
from facegender.errors import UserError
from facegender.model.network import Network, build_network, set_trainable
from facegender.params import Params, Train
from facegender.training.augmentation import augmentation_layers
from facegender.training.batches import make_batches, make_feature_batches, weigh
from facegender.training.callbacks import (
    BestWeights,
    CheckpointEpochs,
    EarlyStopping,
    EpochRecorder,
    FailOnDivergence,
    OnEpoch,
    SeedPerEpoch,
    SwapEma,
)
from facegender.training.checkpoints import Checkpoint
from facegender.training.strategy import Share, distribute

_log = logging.getLogger(__name__)

HISTORY_COLUMNS = ["epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "kept"]
SPEED_COLUMNS = ["epoch", "seconds", "images_per_second"]


@dataclass(frozen=True)
class Training:
    """Results of a training, besides the weights of the kept epoch in the network.

    Attributes:
        history: one row per epoch, HISTORY_COLUMNS; the same bytes for the same seed. `kept` is 1
            for the epoch whose weights are kept, and 0 for the others.
        speed: one row per epoch, SPEED_COLUMNS; differs from run to run.
        kept_epoch: epoch whose weights are kept, from 1; 0 if there was none.
    """

    history: pd.DataFrame
    speed: pd.DataFrame
    kept_epoch: int


def make_deterministic(seed: int) -> None:
    """Seed Python, NumPy and Keras, and allow TensorFlow only deterministic kernels.

    Keras also restarts its numbering of layers, because a model's file contains their names.
    """
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


def new_network(params: Params, strategy: tf.distribute.Strategy | None = None) -> Network:
    """Return the network that parameters describe, after `make_deterministic`.

    Args:
        params: all parameters.
        strategy: result of `open_strategy`; its devices get the weights.

    Raises:
        UserError: as `build_network` does.
    """
    make_deterministic(params.train.seed)
    with (strategy or tf.distribute.get_strategy()).scope():
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
    """Train the head alone, then fine-tune; the network ends with the weights of the kept epoch.

    The head learns from features that are computed once. Fine-tuning may begin on small images
    (Howard, Training Imagenet in 3 hours for 25 minutes, fast.ai 2018) and ends on full ones.

    Order, augmentation and dropout depend only on the seed, the epoch and the step. All other state
    is in the checkpoint, so a resumed training ends with the same bits as an uninterrupted one.

    With several devices, each computes a share of each batch and draws its own random numbers.
    BatchNorm, if trained, then takes its statistics over the whole batch.

    Args:
        network: network for images of the splits' size; its layers are trained in place.
        train: training split.
        validation: validation split; its loss decides which epoch is best.
        recipe: how to train.
        strategy: the strategy that the network was built with.
        on_epoch: called after each epoch is saved; and at the start for each one that the
            checkpoint has already.
        checkpoint: checkpoint to resume from and to save each epoch to; None does neither.
        verbose: Keras' `fit` argument: 1 draws a bar by step, 2 prints a line per epoch.

    Raises:
        UserError: recipe.fine_tune_from does not name a layer, the batch cannot be divided among
            the devices, or training diverges.
    """
    strategy = strategy or tf.distribute.get_strategy()
    recipe = with_global_batch_size(recipe, strategy)
    set_trainable(network.trained_base, recipe.fine_tune_from)
    network.set_replicated(strategy.num_replicas_in_sync > 1)
    with strategy.scope():
        augmentation = augmentation_layers(recipe.augmentation, recipe.seed)
    model = network.training(augmentation)
    passes, _ = _epoch_length(len(train), recipe)
    recorder, best = EpochRecorder(len(train)), BestWeights(model)
    checkpoints = CheckpointEpochs(model, checkpoint or Checkpoint(None), recorder, best, on_epoch)
    callbacks = [SeedPerEpoch(model, strategy), recorder, best, FailOnDivergence(), checkpoints]
    job = _Job(
        train=train,
        validation=validation,
        recipe=recipe,
        strategy=strategy,
        small=_small_size(recipe, network.image_size),
        callbacks=callbacks,
        checkpoints=checkpoints,
        verbose=verbose,
    )
    if checkpoints.done < recipe.head_epochs:
        _train_head(network, job)
    if recipe.epochs:
        if checkpoints.done <= recipe.head_epochs:
            # Fine-tuning starts from the head's best weights, but is not compared with them.
            best.restart()
        recorder.images = passes * len(train)
        _fine_tune(model, job)
    if recipe.keep == "best" or not recorder.history:
        best.restore()
        kept = best.epoch
    else:
        kept = recorder.history[-1]["epoch"]
    network.set_replicated(False)
    if recipe.mixed_precision:
        network.set_float32()

    history = pd.DataFrame(recorder.history, columns=HISTORY_COLUMNS)
    history["kept"] = (history["epoch"] == kept).astype(int)
    speed = pd.DataFrame(recorder.speed, columns=SPEED_COLUMNS)
    return Training(history, speed, kept)


def _small_size(recipe: Train, image_size: int) -> int | None:
    """Return the pixels a side of the small images, or None if there are none to begin with."""
    small = recipe.small_image_size
    if not recipe.small_epochs or small is None or small > image_size:
        return None
    if recipe.small_epochs >= recipe.epochs:
        # For example, if only `epochs` of a recipe was lowered.
        _log.warning(
            "train.small_epochs leaves none of the %d epochs for images of %d pixels, the size of "
            "the model's input: lower it as well",
            recipe.epochs,
            image_size,
        )
    return small


@dataclass(frozen=True)
class _Job:
    """State that the head and fine-tuning share.

    Attributes:
        train: training split.
        validation: validation split.
        recipe: how to train, with the batch size of all devices together.
        strategy: the strategy that the network was built with.
        small: pixels a side of the images to begin with; None trains on full ones only.
        callbacks: callbacks of Keras' `fit`; the last one is `checkpoints`.
        checkpoints: epochs that earlier processes finished; saves each new one.
        verbose: Keras' `fit` argument.
    """

    train: ProcessedSplit
    validation: ProcessedSplit
    recipe: Train
    strategy: tf.distribute.Strategy
    small: int | None
    callbacks: list[keras.callbacks.Callback]
    checkpoints: CheckpointEpochs
    verbose: int


def _train_head(network: Network, job: _Job) -> None:
    """Train the head on features of the frozen base, each computed once, without augmentation."""
    train, validation, recipe, strategy = job.train, job.validation, job.recipe, job.strategy
    extract = network.features()
    inputs, val_inputs = (
        # Half precision takes half the memory, and does not make the head worse.
        extract.predict(make_batches(part, recipe.batch_size, size=job.small), verbose=0).astype(
            "float16"
        )
        for part in (train, validation)
    )
    schedule = keras.optimizers.schedules.CosineDecay(
        recipe.head_learning_rate, recipe.head_epochs * math.ceil(len(train) / recipe.batch_size)
    )
    head = _for_strategy(network.head, strategy)

    def train_share(share: Share) -> tf.data.Dataset:
        epochs = range(job.checkpoints.done, recipe.head_epochs)
        return _with_class_weights(
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
        _compile_model(head, recipe, schedule)
        _build_optimizer(head, strategy, (val_inputs[:1], validation.labels[:1, None]))
        job.checkpoints.restore_optimizer(head)
        head.fit(
            distribute(strategy, train_share),
            validation_data=distribute(strategy, validation_share),
            initial_epoch=job.checkpoints.done,
            epochs=recipe.head_epochs,
            steps_per_epoch=math.ceil(len(train) / recipe.batch_size),
            validation_steps=math.ceil(len(validation) / recipe.batch_size),
            shuffle=False,  # the dataset shuffles itself
            callbacks=job.callbacks,
            verbose=job.verbose,
        )


def _fine_tune(model: keras.Model, job: _Job) -> None:
    """Train the whole network, first on small images, then on full ones."""
    train, validation, recipe, strategy = job.train, job.validation, job.recipe, job.strategy
    callbacks = job.callbacks
    passes, steps = _epoch_length(len(train), recipe)
    warmup = recipe.warmup_epochs * steps
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup else recipe.learning_rate,
        warmup_target=recipe.learning_rate if warmup else None,
        warmup_steps=warmup,
        decay_steps=max(1, recipe.epochs * steps - warmup),
        # A decay to all of the rate keeps it constant.
        alpha=1.0 if recipe.schedule == "constant" else 0.0,
    )
    model = _for_strategy(model, strategy)
    done = max(0, job.checkpoints.done - recipe.head_epochs)
    with strategy.scope():
        _compile_model(model, recipe, schedule, average_steps=recipe.ema_epochs * steps)
        example = validation.read(np.arange(1)), validation.labels[:1, None]
        _build_optimizer(model, strategy, example)
        if done:
            job.checkpoints.restore_optimizer(model)
    averages = SwapEma(averaged=done > 0) if recipe.ema_epochs else None
    if averages is not None:
        # First, so that the others judge and save the averaged weights.
        callbacks = [averages, *callbacks]
    if recipe.early_stopping_patience:
        # Before `checkpoints`, which does not save the epoch at which training stops.
        patience = recipe.early_stopping_patience
        stopper = EarlyStopping(
            patience, job.checkpoints.recorder.history, after=recipe.head_epochs, averages=averages
        )
        callbacks = [*callbacks[:-1], stopper, job.checkpoints]
    first_full = min(recipe.small_epochs, recipe.epochs) if job.small else 0
    for size, epochs in ((job.small, range(first_full)), (None, range(first_full, recipe.epochs))):
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
                # Higher than the seeds of the augmentation layers.
                framing_seed=recipe.seed + 100,
            )
            return _with_class_weights(batches, train, recipe)

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
                verbose=job.verbose,
            )


def with_global_batch_size(recipe: Train, strategy: tf.distribute.Strategy) -> Train:
    """Return the recipe with the batch size of all devices together.

    Raises:
        UserError: the batch cannot be divided among them.
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

    With several, Keras averages what a step returns over the first axis, which scalars lack.
    """

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Train on a batch, and return the metrics, each of shape (1,)."""
        return {name: value[None] for name, value in super().train_step(data).items()}

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Test on a batch, and return the metrics, each of shape (1,)."""
        return {name: value[None] for name, value in super().test_step(data).items()}


def _for_strategy(model: keras.Model, strategy: tf.distribute.Strategy) -> keras.Model:
    """Return a model of the same layers that `fit` can train with the strategy.

    Call it outside the strategy's scope: otherwise Keras first averages a batch of uint8 images
    over all workers, and fails.
    """
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return _AcrossWorkers(model.inputs[0], model.outputs[0], name=model.name)
    if strategy.num_replicas_in_sync > 1:
        return keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    return model


def _build_optimizer(
    model: keras.Model, strategy: tf.distribute.Strategy, example: tuple[np.ndarray, np.ndarray]
) -> None:
    """Create the variables of the optimizer and the metrics of a compiled model.

    Otherwise the first step of `fit` creates them, and TensorFlow traces the step twice, for
    seconds. On several devices it fails, because they cannot synchronise in the conditional branch
    that creates them (keras-team/keras issue 19246).
    """
    model.optimizer.build(model.trainable_variables)
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("ERROR")  # it would warn that a step without a graph is slow
    strategy.run(model.test_step, args=(example,))
    logger.setLevel(level)


def _epoch_length(images: int, recipe: Train) -> tuple[int, int]:
    """Return how often an epoch passes over the images, and its steps.

    Few images make few steps, too few to learn from. Then an epoch passes over the images several
    times, each time with new augmentation.
    """
    steps = math.ceil(images / recipe.batch_size)
    passes = max(1, math.ceil(recipe.min_steps_per_epoch / steps))
    return passes, passes * steps


def _compile_model(
    model: keras.Model,
    recipe: Train,
    schedule: keras.optimizers.schedules.LearningRateSchedule,
    average_steps: float = 0,
) -> None:
    """Compile a model that ends in logits; weights are averaged over some steps (0: not at all)."""
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


def _with_class_weights(
    batches: tf.data.Dataset, part: ProcessedSplit, recipe: Train
) -> tf.data.Dataset:
    """Return the batches with class weights, if the recipe asks for them."""
    if recipe.class_weights == "none":
        return batches
    from sklearn.utils.class_weight import compute_class_weight

    return weigh(batches, compute_class_weight("balanced", classes=np.array([0, 1]), y=part.labels))
