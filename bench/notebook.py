"""The study's notebook in plain Keras: what someone would run without this project.

It fine-tunes all of MobileNet with `fit` on an ImageDataGenerator, without a seed or a validation
split, and looks at the test split after each epoch, as the study does.
"""

import time
from collections.abc import Callable

import keras
import numpy as np
from keras.src.legacy.preprocessing.image import ImageDataGenerator  # Keras 3 hides it

EPOCHS = 15
_SIZE = 224
_BATCH = 32


def new_model(weights: str) -> keras.Model:
    """Build MobileNet with one unit for the probability of male, compiled."""
    base = keras.applications.MobileNet(
        input_shape=(_SIZE, _SIZE, 3), include_top=False, weights=weights, pooling="avg"
    )
    model = keras.Sequential([base, keras.layers.Dense(1, activation="sigmoid")])
    # Adam's rate, and the ranges below, are the guesses of conf/recipe/paper.yaml.
    model.compile(keras.optimizers.Adam(1e-4), "binary_crossentropy", metrics=["accuracy"])
    return model


def train(
    images: np.ndarray,
    labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    weights: str,
    *,
    on_epoch: Callable[[int, float, float], None],
) -> np.ndarray:
    """Train for 15 epochs and return the probabilities of the test split, float32 of shape (n,).

    Args:
        images: uint8 of shape (m, 224, 224, 3), already decoded.
        labels: 0 or 1, (m,).
        test_images: uint8 of shape (n, 224, 224, 3).
        test_labels: 0 or 1, (n,).
        weights: imagenet, or a no-top weights file in Keras' layout.
        on_epoch: called after each epoch with its number from 1, the seconds since the start, and
            the accuracy on the test split.
    """
    prepare = keras.applications.mobilenet.preprocess_input
    augmented = ImageDataGenerator(
        zoom_range=0.1,
        width_shift_range=0.1,
        height_shift_range=0.1,
        preprocessing_function=prepare,
    ).flow(images, labels, batch_size=_BATCH)
    plain = ImageDataGenerator(preprocessing_function=prepare).flow(
        test_images, test_labels, batch_size=_BATCH, shuffle=False
    )
    model = new_model(weights)
    start = time.perf_counter()

    def end(epoch: int, logs: dict[str, float]) -> None:
        on_epoch(epoch + 1, time.perf_counter() - start, logs["val_accuracy"])

    model.fit(
        augmented,
        validation_data=plain,
        epochs=EPOCHS,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=end)],
        verbose=0,
    )
    return model.predict(plain, verbose=0)[:, 0]
