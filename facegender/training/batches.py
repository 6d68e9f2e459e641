"""Batches: processed data as a stream of images and labels, in an order decided by the seed."""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from facegender.data.processed import ProcessedSplit
from facegender.training.strategy import WHOLE, Share


def make_batches(
    part: ProcessedSplit,
    batch_size: int,
    *,
    shuffle_seed: int | None = None,
    epochs: range = range(1),
    size: int | None = None,
    share: Share = WHOLE,
    framing_seed: int | None = None,
) -> tf.data.Dataset:
    """Return batches of (images, labels), read in advance while training runs.

    The order within an epoch depends only on (shuffle_seed, epoch), so an epoch's batches are the
    same whether or not earlier epochs ran in this process.

    Args:
        part: processed data.
        batch_size: images a batch; the last one of an epoch may be smaller.
        shuffle_seed: None keeps the order of the index.
        epochs: the epochs to yield, one after another.
        size: pixels a side to shrink the images to; None does not shrink them.
        share: the part of each batch to read; its pieces come one after another.
        framing_seed: decides, with the epoch, how each image is cut at random out of `part.wide`,
            if there is one; None reads the images as they are.

    Returns:
        A dataset of uint8 (batch, size, size, 3) and float32 (batch, 1).
    """
    labels = tf.constant(part.labels, tf.float32)[:, None]

    wide = part.wide if framing_seed is not None else None
    source = wide or part

    def read(positions: tf.Tensor, epoch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        images = tf.numpy_function(source.read, [positions], tf.uint8)
        images = tf.ensure_shape(images, (None, *source.images.shape[1:]))
        if wide is not None:
            key = tf.stack([tf.constant(framing_seed, tf.int64), epoch])
            # For all images, so that neither order nor devices make a difference.
            draws = tf.random.stateless_uniform((len(part), 3), key, -1, 1)
            images = _cut(images, part.images.shape[1], tf.gather(draws, positions))
        return images, tf.gather(labels, positions)

    def shrink(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # The mean over each new pixel's area: no aliasing, and much faster than a filter.
        smaller = tf.image.resize(images, (size, size), method="area")
        return tf.cast(tf.round(smaller), tf.uint8), labels

    stream = _positions(len(part), batch_size, shuffle_seed, epochs, share).map(
        read, num_parallel_calls=2, deterministic=True
    )
    if size is not None:
        stream = stream.map(shrink, num_parallel_calls=2, deterministic=True)
    return stream.prefetch(4)


def make_feature_batches(
    features: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    *,
    shuffle_seed: int | None = None,
    epochs: range = range(1),
    share: Share = WHOLE,
) -> tf.data.Dataset:
    """Return batches of features and labels in memory, in the same order as `make_batches`.

    Args:
        features: shape (n, k).
        labels: shape (n,).
        batch_size: rows a batch; the last one of an epoch may be smaller.
        shuffle_seed: decides the order, with the epoch; None keeps that of the features.
        epochs: the epochs to yield, one after another.
        share: the part of each batch to read, as in `make_batches`.

    Returns:
        A dataset of (batch, k), in the dtype of the features, and float32 (batch, 1).
    """
    rows, answers = tf.constant(features), tf.constant(labels, tf.float32)[:, None]
    return _positions(len(features), batch_size, shuffle_seed, epochs, share).map(
        lambda positions, epoch: (tf.gather(rows, positions), tf.gather(answers, positions))
    )


def weigh(batches: tf.data.Dataset, class_weights: Sequence[float]) -> tf.data.Dataset:
    """Add the weight of its class to each row of (images, labels): float32 (batch,)."""
    by_class = tf.constant(class_weights, tf.float32)
    return batches.map(
        lambda images, labels: (
            images,
            labels,
            tf.gather(by_class, tf.cast(labels[:, 0], tf.int32)),
        )
    )


def _cut(images: tf.Tensor, size: int, draws: tf.Tensor) -> tf.Tensor:
    """Cut random squares out of images with a border, to imitate how a detector's boxes vary.

    With a border of a tenth of `size`, the side varies by up to a tenth, and the centre moves by
    up to half of that.

    Args:
        images: uint8 (n, side, side, 3), with `size` pixels between the borders.
        size: pixels a side of the result.
        draws: float32 (n, 3) from -1 to 1: size, shift down, shift to the right.

    Returns:
        uint8 (n, size, size, 3).
    """
    side = images.shape[1]
    border = (side - size) / 2
    zoom = 1 + border / size * draws[:, :1]
    start = (side - size * zoom + border * draws[:, 1:]) / 2
    # Centres of the first and last pixels, which is where `crop_and_resize` reads.
    first = start + zoom / 2 - 0.5
    last = start + (size - 0.5) * zoom - 0.5
    boxes = tf.concat([first, last], axis=1) / (side - 1)
    cut = tf.image.crop_and_resize(images, boxes, tf.range(tf.shape(images)[0]), (size, size))
    return tf.cast(tf.round(cut), tf.uint8)


def _positions(
    count: int, batch_size: int, shuffle_seed: int | None, epochs: range, share: Share
) -> tf.data.Dataset:
    """Return batches of positions, each with its epoch."""

    def order(epoch: tf.Tensor) -> tf.data.Dataset:
        positions = tf.range(count, dtype=tf.int64)
        if shuffle_seed is not None:
            key = tf.stack([tf.constant(shuffle_seed, tf.int64), epoch])
            positions = tf.random.experimental.stateless_shuffle(positions, seed=key)
        batches = tf.data.Dataset.from_tensor_slices(positions).batch(batch_size)
        return batches.map(lambda positions: (positions, epoch))

    def pieces(positions: tf.Tensor, epoch: tf.Tensor) -> tf.data.Dataset:
        # As equal as possible. No piece may be empty, so a small batch repeats images.
        number = tf.maximum(tf.size(positions), share.of)
        filled = tf.gather(positions, tf.range(number) % tf.size(positions))
        return tf.data.Dataset.range(share.first, share.first + share.count).map(
            lambda piece: (filled[begin(piece, number) : begin(piece + 1, number)], epoch)
        )

    def begin(piece: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        return tf.cast(piece, tf.int32) * number // share.of

    batches = tf.data.Dataset.range(epochs.start, epochs.stop).flat_map(order)
    if share.of > 1:
        batches = batches.flat_map(pieces)
    number = len(epochs) * math.ceil(count / batch_size) * share.count
    # Nothing is left to tune, and `fit` would wait up to a minute for the tuning thread to end.
    # The option also holds for datasets made from this one.
    options = tf.data.Options()
    options.autotune.enabled = False
    # If the number is unknown, Keras warns at the end of the data.
    return batches.apply(tf.data.experimental.assert_cardinality(number)).with_options(options)
