"""The model's accuracy on test pictures that are made worse.

The strengths of blur, noise and JPEG are the middle ones, 3 of 5, of Hendrycks and Dietterich,
Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR 2019
(https://arxiv.org/abs/1903.12261). Blur is a share of the side, so that it looks the same at every
image size.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from PIL import Image, ImageEnhance, ImageFilter
from tqdm import tqdm

from facegender.data.processed import ProcessedSplit
from facegender.evaluation.metrics import paired_interval

BLUR = 3 / 224  # standard deviation, as a share of the side
NOISE = 0.18  # standard deviation, as a share of the range
DARKER, BRIGHTER = 0.5, 1.5  # factors
JPEG_QUALITY = 15


@dataclass(frozen=True)
class Change:
    """A way to make a picture worse.

    Attributes:
        name: name in metrics/robustness.csv.
        strength: strength in words.
        apply: function from uint8 RGB (size, size, 3) and a random generator to the same shape.
    """

    name: str
    strength: str
    apply: Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _blur(pixels: np.ndarray, _: np.random.Generator) -> np.ndarray:
    radius = BLUR * len(pixels)
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def _noise(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    noise = generator.standard_normal(pixels.shape, np.float32) * np.float32(255 * NOISE)
    return (pixels + noise).clip(0, 255).astype(np.uint8)


def _brightness(pixels: np.ndarray, _: np.random.Generator, *, factor: float) -> np.ndarray:
    return np.asarray(ImageEnhance.Brightness(Image.fromarray(pixels)).enhance(factor))


def _jpeg(pixels: np.ndarray, _: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    return np.asarray(Image.open(file))


def _half_resolution(pixels: np.ndarray, _: np.random.Generator) -> np.ndarray:
    # Enlarged as `decode_image` enlarges a picture of half the size.
    image = Image.fromarray(pixels)
    return np.asarray(image.reduce(2).resize(image.size, Image.Resampling.BICUBIC))


CHANGES = (
    Change("blur", f"standard deviation {100 * BLUR:.3g} % of the side", _blur),
    Change("noise", f"standard deviation {100 * NOISE:.3g} % of the range", _noise),
    Change("darker", f"{DARKER:g} times as bright", partial(_brightness, factor=DARKER)),
    Change("brighter", f"{BRIGHTER:g} times as bright", partial(_brightness, factor=BRIGHTER)),
    Change("jpeg", f"JPEG of quality {JPEG_QUALITY}", _jpeg),
    Change("half_resolution", "half the pixels a side", _half_resolution),
)


def robustness_table(
    test: ProcessedSplit,
    predict: Callable[[np.ndarray], np.ndarray],
    probabilities: np.ndarray,
    *,
    threshold: float,
    batch_size: int,
    seed: int,
) -> pd.DataFrame:
    """Compare the accuracy on changed test pictures with that on the originals.

    Args:
        predict: function from uint8 RGB (n, size, size, 3) to P(male), float (n,).
        probabilities: P(male) of the originals, float (n,).
        seed: random seed of the noise.

    Returns:
        A row for each of CHANGES: `change`, `strength`, `n`, `accuracy`, `difference` (accuracy
        minus that of the originals) and the 95 % interval of the difference, paired by image
        (`difference_low`, `difference_high`).
    """
    clean = (probabilities >= threshold) == test.labels
    rows = []
    for change in tqdm(CHANGES, desc="robustness", unit="change", mininterval=1):
        generator = np.random.default_rng(seed)  # no change depends on another
        changed = np.concatenate(
            [
                predict(np.stack([change.apply(image, generator) for image in batch]))
                for batch in test.batches(batch_size)
            ]
        )
        right = (changed >= threshold) == test.labels
        gained, lost = int((right & ~clean).sum()), int((clean & ~right).sum())
        low, high = paired_interval(gained, lost, len(right))
        rows.append(
            {
                "change": change.name,
                "strength": change.strength,
                "n": len(right),
                "accuracy": right.mean(),
                "difference": (gained - lost) / len(right),
                "difference_low": low,
                "difference_high": high,
            }
        )
    return pd.DataFrame(rows)
