"""Augmentation: random changes of training images."""

import keras

from facegender.params import Augmentation


def augmentation_layers(ranges: Augmentation, seed: int) -> list[keras.layers.Layer]:
    """Return Keras layers that change float32 images (n, h, w, 3) at random in training."""
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
