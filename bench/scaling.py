"""Estimate what more photos would cost in storage, core-hours and money, from rates measured now.

Measures each part of the pipeline on a few images, with all cores, and multiplies for 60 thousand,
1 million and 100 million photos. Parts stay linear only while disks and networks keep up, and other
machines have other cores. Pictures are taken whole, without a search for faces. Prices are options,
not offers.

    python -m bench.scaling
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.common import make_raw
from facegender.data.fingerprint_store import fingerprint_images
from facegender.data.near_duplicates import find_near_duplicates
from facegender.data.preprocessing import write_split
from facegender.data.processed import ProcessedSplit
from facegender.data.raw_manifest import build_manifest
from facegender.data.sources.sample import draw_sample
from facegender.params import Params, load_params
from facegender.runtime.entry_points import run_command
from tools.compose_params import compose

PHOTOS = (60_000, 1_000_000, 100_000_000)
_TRAINED = 128  # images


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000, help="JPEGs to measure with (2000)")
    parser.add_argument("--core-hour", type=float, default=0.04, help="price of one (0.04)")
    parser.add_argument("--tb-month", type=float, default=23.0, help="price of one (23)")
    args = parser.parse_args()
    cores = os.cpu_count() or 1

    with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
        seconds, sizes = measure_parts(Path(folder), args.images)
    print(f"measured on {cores} cores, core-seconds for each 1,000 images")
    for part, each in seconds.items():
        print(f"  {part:<36} {1000 * cores * each:10.2f}")
    rows: list[tuple[str, str, list[float], float]] = []
    for part, each in seconds.items():
        rows.append((part, "core-hours", [n * cores * each / 3600 for n in PHOTOS], args.core_hour))
    for part, size in sizes.items():
        rows.append((part, "TB", [n * size / 1e12 for n in PHOTOS], args.tb_month))
    print(f"\namount (its price at {args.core_hour} a core-hour, {args.tb_month} a TB and month)")
    print(f"{'photos':<36} {'':<10}", *(f"{n:>26,}" for n in PHOTOS))
    for part, unit, amounts, price in rows:
        cells = (f"{f'{n:,.3f} ({n * price:,.2f})':>26}" for n in amounts)
        print(f"{part:<36} {unit:<10}", *cells)


def measure_parts(folder: Path, images: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return each part's seconds per image, with all cores, and the bytes stored per image."""
    raw = folder / "raw"
    manifest = make_raw(raw, images)
    compose(folder / "params.yaml", "recipe=best", "model.weights=none")
    params = load_params(folder / "params.yaml")
    size = params.image.size
    fingerprint_images(manifest[:64], raw)  # starts the processes
    write_split(manifest[:_TRAINED], raw, folder / "few", size=size, name="train")
    few = ProcessedSplit(folder / "few")
    seconds = {
        "split: checking each": seconds_of(lambda: fingerprint_images(manifest, raw)) / images,
        "split: near duplicates": seconds_of_comparison(folder / "drawn", max(images, 2000)),
        "preprocess": seconds_of(
            lambda: write_split(manifest, raw, folder / "part", size=size, name="train")
        )
        / images,
        **seconds_of_training(folder, few, params),
    }
    sizes = {
        "data/raw": float(np.mean([(raw / path).stat().st_size for path in manifest["path"]])),
        "data/processed": (folder / "part" / "images.npy").stat().st_size / images,
    }
    return seconds, sizes


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def seconds_of_comparison(folder: Path, images: int) -> float:
    """Return the seconds per image of looking for near duplicates among the sample's drawings."""
    folder.mkdir()
    draw_sample(folder, per_class=images // 2, image_size=128, seed=0)
    manifest = build_manifest(folder, female=["female"], male=["male"], ignore=[])
    fingerprints = fingerprint_images(manifest, folder, scratch=folder.parent)
    return seconds_of(lambda: find_near_duplicates(fingerprints.thumbnails)) / images


def seconds_of_training(folder: Path, part: ProcessedSplit, params: Params) -> dict[str, float]:
    """Return the seconds per image of training and of predicting."""
    from facegender.inference.export import convert
    from facegender.inference.litert import load_litert
    from facegender.training import train as training
    from facegender.training.batches import make_batches

    network, small = training.new_network(params), params.train.small_image_size
    extract = network.features()
    batches = make_batches(part, params.train.batch_size, size=small)
    extract.predict(batches, verbose=0)  # compiles
    features = seconds_of(lambda: extract.predict(batches, verbose=0)) / len(part)
    # The first epoch at each image size also compiles, so it is not counted.
    recipe = params.train.model_copy(update={"head_epochs": 0, "epochs": 4, "small_epochs": 2})
    speed = training.train_network(network, part, part, recipe, verbose=0).speed
    rates = speed["images_per_second"].tolist()
    epochs = params.train.small_epochs
    fine_tuning = epochs / rates[1] + (params.train.epochs - epochs) / rates[3]

    exported = folder / "model.tflite"
    exported.write_bytes(convert(network.inference(), part.images[:8])[0])
    predictor = load_litert(exported, threads=os.cpu_count() or 1)
    predictor.predict(part.images[:32])
    prediction = seconds_of(lambda: [predictor.predict(batch) for batch in part.batches(32)])
    return {
        "train: features for the head": features,
        f"train: {params.train.epochs} epochs of fine-tuning": fine_tuning,
        "evaluate, score": prediction / len(part),
    }


if __name__ == "__main__":
    run_command(main)
