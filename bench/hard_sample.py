"""Make a harder sample to develop recipes on: the sample's drawings, badly photographed.

Each picture is cropped, blurred, relit and noised at random, and saved as a JPEG of 200 pixels, the
study's size. The details that distinguish the classes may be cut off, small or lost in noise.
"""

import io
from pathlib import Path

import joblib
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from facegender.data.sources.sample import CLASSES, draw_attributes, render

_SIDE = 200  # pixels


def make_hard_sample(folder: Path, images: int, *, seed: int) -> None:
    """Draw female/0000.jpg, ..., male/0000.jpg, ... into a new folder; half of `images` each."""
    for label in CLASSES:
        (folder / label).mkdir(parents=True)
    joblib.Parallel(n_jobs=-1)(
        joblib.delayed(_draw)(folder / label / f"{index:04}.jpg", label, index, seed)
        for label in CLASSES
        for index in range(images // 2)
    )


def _draw(path: Path, label: str, index: int, seed: int) -> None:
    generator = np.random.default_rng([seed, 1, CLASSES.index(label), index])
    with Image.open(io.BytesIO(render(draw_attributes(label, index, seed), 2 * _SIDE))) as drawn:
        image = drawn.convert("RGB")
    image = image.rotate(generator.uniform(-20, 20), Image.Resampling.BICUBIC)
    side = generator.uniform(0.35, 0.8) * image.width
    left, top = generator.uniform(0, image.width - side, 2)
    image = image.resize(
        (_SIDE, _SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
    )
    image = image.filter(ImageFilter.GaussianBlur(generator.uniform(0, 4)))
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(generator.uniform(0.4, 1.4))
    noisy = np.asarray(image) + generator.normal(0, generator.uniform(5, 35), (_SIDE, _SIDE, 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=80)
