"""Export: the trained model in LiteRT's format, as float32 and as int8, and what that costs."""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from facegender.data.processed import ProcessedSplit
from facegender.inference.predictor import Predictor

# P(male) of one model on two runtimes (Keras and LiteRT), which add float32 numbers in different
# orders: 1.6e-6 on a CPU with AMX. Within one runtime, P(male) must be equal.
MAX_FLOAT_DIFFERENCE = 1e-4
# Accuracy that int8 may lose.
MAX_INT8_LOSS = 0.01


def calibration_images(part: ProcessedSplit, count: int, seed: int) -> np.ndarray:
    """Return `count` images of a part, or all if it has fewer, drawn without replacement.

    Returns:
        uint8 of shape (count, size, size, 3), in the order of the part.
    """
    drawn = np.random.default_rng(seed).choice(len(part), min(count, len(part)), replace=False)
    return part.images[part.rows[np.sort(drawn)]]


def convert(model: keras.Model, calibration: np.ndarray) -> tuple[bytes, bytes]:
    """Convert a model to LiteRT twice; the same weights give the same bytes.

    Args:
        model: takes uint8 (n, size, size, 3), gives P(male), float32 (n, 1).
        calibration: images, uint8 (n, size, size, 3), from which int8 takes the ranges of
            activations.

    Returns:
        The model in float32; and with int8 weights, by channel, and int8 activations. Both take
        and give what `model` does, in batches of any size.
    """
    images = tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8, name="image")
    # Variables and one function, without all that Keras' own export adds: half the time.
    module = tf.Module()
    module.weights = [variable.value for variable in model.variables]
    module.serve = tf.function(
        lambda image: {"output_0": model(image, training=False)},
        input_signature=[images],
        autograph=False,
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # Of the statistics that inputs had in TensorFlow 1.
        warnings.filterwarnings("ignore", "Statistics for quantized inputs")
        tf.saved_model.save(module, folder, signatures=module.serve)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        float32 = converter.convert()
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([image[None]] for image in calibration)
        # Without float kernels to fall back to, a layer that cannot be int8 is an error.
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = tf.uint8
        int8 = converter.convert()
    return float32, int8


def exported_metrics(
    path: Path,
    predictor: Predictor,
    test: ProcessedSplit,
    expected: np.ndarray,
    *,
    threshold: float,
    batch_size: int,
) -> dict[str, float]:
    """Return what an exported model is worth.

    Args:
        path: the model's file.
        predictor: the model, loaded with one thread.
        test: the images to judge it on.
        expected: P(male) by the Keras model, float64 (n,), in the order of `test`.
        threshold: P(male) from which the prediction is male.
        batch_size: images at a time.

    Returns:
        size_bytes, accuracy, max_abs_difference of P(male) from `expected`, and latency_ms of one
        image.
    """
    probabilities = np.concatenate([predictor.predict(batch) for batch in test.batches(batch_size)])
    image = next(test.batches(1))
    return {
        "size_bytes": path.stat().st_size,
        "accuracy": float(((probabilities >= threshold) == test.labels).mean()),
        "max_abs_difference": float(np.abs(probabilities - expected).max()),
        "latency_ms": 1000 * median_seconds(lambda: predictor.predict(image)),
    }


def median_seconds(run: Callable[[], object], *, runs: int = 50) -> float:
    """Return the median time of `runs` calls, after a few that nobody counts."""
    times = []
    for _ in range(runs + 5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[5:])
