"""Shared by the benchmarks: images made by repetition, and rates measured side by side."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from facegender.data.raw_manifest import build_manifest
from facegender.faces.settings import FaceCrop

if TYPE_CHECKING:
    from facegender.model.network import Network

# The defaults of image.crop in conf/config.yaml.
CROP = FaceCrop(margin=0.25, align=False, min_score=0.75, min_size=16)


def make_raw(folder: Path, images: int, *, size: int = 200, distinct: int = 100) -> pd.DataFrame:
    """Fill a new folder with JPEG images of both classes and return their manifest.

    The pictures are soft shapes with a little noise, about as large in bytes as a portrait.

    Args:
        folder: directory to make.
        images: number of files.
        size: pixels a side.
        distinct: number of pictures drawn; the other files are hard links to them.
    """
    generator = np.random.default_rng(0)
    for name in ("female", "male"):
        (folder / name).mkdir(parents=True)
    files = [folder / ("female", "male")[i % 2] / f"{i:06}.jpg" for i in range(images)]
    for path in files[:distinct]:
        coarse = Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        shapes = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
        noisy = shapes + generator.normal(0, 5, shapes.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    for i, path in enumerate(files[distinct:]):
        os.link(files[i % distinct], path)
    return build_manifest(folder, female=["female"], male=["male"], ignore=[])


def new_network(size: int, alpha: float = 1.0, **settings: Any) -> "Network":
    """Return an untrained MobileNet for images of a side; settings are those of `build_network`."""
    from facegender.model.network import build_network

    defaults: dict[str, Any] = {
        "weights": "none",
        "dropout": 0.0,
        "batch_norm": "train",
        "batch_norm_momentum": 0.9,
        "seed": 1,
    }
    return build_network(image_size=size, alpha=alpha, **(defaults | settings))


def measure(
    runs: dict[str, Callable[[], int]], rounds: int, *, clear: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Run the functions in turns, once a round, so that a busy machine slows all of them.

    Args:
        runs: functions by name, each returning the number of images it processed.
        rounds: number of times to run each.
        clear: removes a run's outputs; not timed.

    Returns:
        By name, images per second in each round.
    """
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            images = run()
            rates[name].append(images / (time.perf_counter() - start))
            clear()
    return rates


def report(rates: dict[str, list[float]], ratios: list[tuple[str, str]]) -> None:
    """Print the median rate of each run, and the median over rounds of ratios between them."""
    for name, values in rates.items():
        print(f"{name:<44} {statistics.median(values):9,.0f} images/s")
    for name, base in ratios:
        each = [a / b for a, b in zip(rates[name], rates[base], strict=True)]
        spread = f"{min(each):.2f} to {max(each):.2f}"
        print(f"{f'{name} / {base}':<44} {statistics.median(each):9.2f} ({spread})")


def peak_memory(pid: int) -> float:
    """Return the largest resident memory of a process so far in MB. Linux only.

    Pages of mapped files count. Unlike ru_maxrss, the parent process's memory does not.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
