"""The study's notebook in plain Keras: what someone would run without this project.

It fine-tunes all of MobileNet with `fit` on an ImageDataGenerator, without a seed or a validation
split, and looks at the test split after each epoch, as the study does.
"""

import time
from collections.abc import Callable, Mapping

import keras
import numpy as np
from keras.src.legacy.preprocessing.image import ImageDataGenerator  # Keras 3 hides it

from facegender.data.processed import ProcessedSplit

EPOCHS = 15
_SIZE = 224
_BATCH = 32


def new_model(weights: str) -> keras.Model:
    """Build MobileNet with one unit for the probability of male, compiled; it takes pixels."""
    base = keras.applications.MobileNet(
        input_shape=(_SIZE, _SIZE, 3), include_top=False, weights=weights, pooling="avg"
    )
    scale = keras.layers.Rescaling(1 / 127.5, offset=-1)  # MobileNet's preprocess_input
    model = keras.Sequential([scale, base, keras.layers.Dense(1, activation="sigmoid")])
    # Adam's rate, and the ranges below, are the guesses of conf/recipe/paper.yaml.
    model.compile(keras.optimizers.Adam(1e-4), "binary_crossentropy", metrics=["accuracy"])
    return model


def train(
    parts: Mapping[str, ProcessedSplit],
    weights: str,
    *,
    on_epoch: Callable[[int, float, float], None],
) -> keras.Model:
    """Train for 15 epochs on all images outside the test split.

    Args:
        parts: the train, validation and test splits, of 224 pixels.
        weights: imagenet, or a no-top weights file in Keras' layout.
        on_epoch: called after each epoch with its number from 1, the seconds since the start, and
            the accuracy on the test split.

    Returns:
        A model from uint8 pixels to P(male).
    """
    seen, test = [parts["train"], parts["validation"]], parts["test"]
    images = np.concatenate([batch for part in seen for batch in part.batches(512)])
    labels = np.concatenate([part.labels for part in seen])
    augmented = ImageDataGenerator(
        zoom_range=0.1, width_shift_range=0.1, height_shift_range=0.1
    ).flow(images, labels, batch_size=_BATCH)
    model = new_model(weights)
    start = time.perf_counter()

    def end(epoch: int, logs: dict[str, float]) -> None:
        on_epoch(epoch + 1, time.perf_counter() - start, logs["val_accuracy"])

    model.fit(
        augmented,
        validation_data=(test.read(np.arange(len(test))), test.labels),
        validation_batch_size=_BATCH,
        epochs=EPOCHS,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=end)],
        verbose=0,
    )
    return model
