"""Pictures without a face: backgrounds of group photos, and pictures in which none may be found."""

from collections.abc import Callable
from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images

from facegender.data.sources.sample import CLASSES, draw_attributes, render


def noise(generator: np.random.Generator, width: int = 1024, height: int = 1024) -> Image.Image:
    """Return soft shapes with noise."""
    coarse = Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    shapes = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    noisy = shapes + generator.normal(0, generator.uniform(2, 40), shapes.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def photo(generator: np.random.Generator, width: int = 1024, height: int = 1024) -> Image.Image:
    """Return a part of a photo of a temple or of a flower, perhaps mirrored."""
    picture = _photos()[generator.integers(2)]
    side = int(generator.integers(200, 428))
    left = int(generator.integers(0, picture.width - side + 1))
    top = int(generator.integers(0, picture.height - side + 1))
    part = picture.crop((left, top, left + side, top + side))
    if generator.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return part.resize((width, height), Image.Resampling.BICUBIC)


def gradient(generator: np.random.Generator) -> Image.Image:
    """Return a gradient between two colours, straight or round."""
    y, x = np.mgrid[-1:1:800j, -1:1:1000j]  # type: ignore[misc]
    angle = generator.uniform(0, 2 * np.pi)
    straight = (x * np.cos(angle) + y * np.sin(angle) + 1.5) / 3
    share = np.hypot(x, y) / 1.5 if generator.random() < 0.5 else straight
    start, end = generator.uniform(0, 255, (2, 3))
    return Image.fromarray((start + share[..., None] * (end - start)).clip(0, 255).astype(np.uint8))


def text(generator: np.random.Generator) -> Image.Image:
    """Return a page of letters, dark on light or light on dark."""
    paper, ink = generator.permutation([int(generator.integers(0, 90)), 235])
    picture = Image.new("RGB", (900, 1200), (int(paper),) * 3)
    draw = ImageDraw.Draw(picture)
    y = 20
    while y < 1180:
        size = int(generator.integers(12, 60))
        letters = generator.choice(list("abcdefghijklmnopqrstuvwxyzO08Q@%&()   "), 80)
        draw.text((20, y), "".join(letters), (int(ink),) * 3, ImageFont.load_default(size))
        y += int(1.4 * size)
    return picture


def texture(generator: np.random.Generator) -> Image.Image:
    """Return waves of several directions and lengths, or dots, or bricks."""
    y, x = np.mgrid[:800, :1000]
    kind = generator.integers(3)
    if kind == 0:
        values = np.zeros(x.shape)
        for length, angle, phase in generator.uniform([8, 0, 0], [200, np.pi, 6.3], (6, 3)):
            values += np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / length + phase)
    else:
        period = generator.integers(20, 200)
        row = y // (period if kind == 1 else period // 2)
        across = (x + (row % 2) * period / 2) % period - period / 2
        along = y % period - period / 2
        # Dots, or the joints between bricks.
        joints = np.minimum(np.abs(across), np.abs(y % (period // 2))) > 3
        values = (
            np.where(np.hypot(across, along) < period / 4, 1, -1) if kind == 1 else 1.0 * joints
        )
    share = (values - values.min()) / max(np.ptp(values), 1e-9)
    start, end = generator.uniform(0, 255, (2, 3))
    noisy = start + share[..., None] * (end - start) + generator.normal(0, 5, (*x.shape, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def clothes(generator: np.random.Generator) -> Image.Image:
    """Return the lower quarter of one of the sample's drawings, which shows clothes alone."""
    number = int(generator.integers(1_000_000))
    attributes = draw_attributes(CLASSES[number % 2], number, seed=7)
    with Image.open(BytesIO(render(attributes, 1000))) as drawing:
        return drawing.convert("RGB").crop((0, 750, 1000, 1000))


EMPTY: dict[str, Callable[[np.random.Generator], Image.Image]] = {
    "noise": noise,
    "photos": photo,
    "gradients": gradient,
    "text": text,
    "textures": texture,
    "clothes": clothes,
}


@cache
def _photos() -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]
