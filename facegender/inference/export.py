"""Export a trained model to LiteRT, as float32 and int8, and measure what that costs."""

import statistics
import tempfile
import timeit
import warnings
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from facegender.data.processed import ProcessedSplit
from facegender.inference.predictor import Predictor

# Largest difference of P(male) between Keras and LiteRT, which add float32 numbers in different
# orders: 1.6e-6 on a CPU with AMX. Within one runtime, P(male) must be equal.
MAX_FLOAT_DIFFERENCE = 1e-4
# Largest loss of accuracy from int8.
MAX_INT8_LOSS = 0.01


def representative_images(split: ProcessedSplit, count: int, seed: int) -> np.ndarray:
    """Return up to `count` images, drawn without replacement, in the order of the split.

    Returns:
        uint8 of shape (count, size, size, 3).
    """
    drawn = np.random.default_rng(seed).choice(len(split), min(count, len(split)), replace=False)
    return split.images[split.rows[np.sort(drawn)]]


def convert(model: keras.Model, representative: np.ndarray) -> tuple[bytes, bytes]:
    """Convert a model to LiteRT twice; the same weights give the same bytes.

    Args:
        model: model from uint8 (n, size, size, 3) to P(male), float32 (n, 1).
        representative: images that set the ranges of int8 activations, uint8 (n, size, size, 3).

    Returns:
        The model in float32; and with int8 weights (per channel) and activations. Both have the
        inputs and outputs of `model`, in batches of any size.
    """
    images = tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8, name="image")
    # Variables and one function only: half the time of Keras' own export.
    module = tf.Module()
    module.weights = [variable.value for variable in model.variables]
    module.serve = tf.function(
        lambda image: {"output_0": model(image, training=False)},
        input_signature=[images],
        autograph=False,
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # TensorFlow 1 needed statistics of the inputs; this warning is about them.
        warnings.filterwarnings("ignore", "Statistics for quantized inputs")
        tf.saved_model.save(module, folder, signatures=module.serve)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        float32 = converter.convert()
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([image[None]] for image in representative)
        # Without float kernels as a fallback, a layer that cannot be int8 is an error.
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = tf.uint8
        int8 = converter.convert()
    return float32, int8


def exported_metrics(
    path: Path,
    predictor: Predictor,
    validation: ProcessedSplit,
    expected: np.ndarray,
    *,
    threshold: float,
    batch_size: int,
) -> dict[str, float]:
    """Measure an exported model.

    Args:
        predictor: the model, loaded with one thread.
        validation: validation split; the test split must not decide which export is used.
        expected: P(male) by the Keras model, float64 (n,), in the order of `validation`.

    Returns:
        size_bytes, accuracy, max_abs_difference of P(male) from `expected`, and latency_ms of one
        image.
    """
    probabilities = np.concatenate(
        [predictor.predict(batch) for batch in validation.batches(batch_size)]
    )
    image = next(validation.batches(1))
    return {
        "size_bytes": path.stat().st_size,
        "accuracy": float(((probabilities >= threshold) == validation.labels).mean()),
        "max_abs_difference": float(np.abs(probabilities - expected).max()),
        "latency_ms": 1000 * median_seconds(lambda: predictor.predict(image)),
    }


def median_seconds(run: Callable[[], object]) -> float:
    """Return the median time of 50 calls, after five warm-up calls."""
    return statistics.median(timeit.repeat(run, number=1, repeat=55)[5:])
