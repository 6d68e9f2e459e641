"""Measure what finding near duplicates costs among drawings like the sample's, and how similar
different pictures are.

Prints the times of both steps and the memory for each number of drawings. Then it prints, for the
sample and each folder given, the pairs that are nearest to the limit, as multiples of it: up to 1,
a pair counts as one picture.

    python -m bench.duplicates ../shared/faces ../shared/photos
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from joblib.externals import loky

from bench.common import peak_memory
from facegender.data import alignment, similar_pictures
from facegender.data.fingerprint_store import fingerprint_images
from facegender.data.image_files import find_images
from facegender.data.near_duplicates import find_near_duplicates
from facegender.data.sources.sample import draw_sample
from facegender.runtime.entry_points import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="folders of pictures")
    parser.add_argument(
        "--drawings",
        type=int,
        action="append",
        help="number of drawings; may be repeated (1500 and 6000)",
    )
    args = parser.parse_args()
    counts = args.drawings or [1500, 6000]
    with tempfile.TemporaryDirectory(prefix="facegender-") as name:
        drawn = Path(name) / "drawn"
        drawn.mkdir()
        draw_sample(drawn, per_class=max(counts) // 2, image_size=128, seed=0)
        for count in counts:
            # In its own process, so that its memory is that of this step alone.
            step = multiprocessing.get_context("spawn").Process(
                target=report_cost, args=[drawn, count]
            )
            step.start()
            step.join()
        sample = Path(name) / "sample"
        sample.mkdir()
        draw_sample(sample, per_class=600, image_size=128, seed=42)
        for folder in [sample, *args.folders]:
            report_distances(folder)


def manifest_of(folder: Path) -> pd.DataFrame:
    return pd.DataFrame({"path": [str(path) for path in find_images(folder)], "sha256": ""})


def report_cost(folder: Path, count: int) -> None:
    """Print the time and memory of checking the first drawings of each class."""
    manifest = manifest_of(folder)
    # A larger sample holds the smaller ones.
    manifest = manifest[manifest["path"].map(lambda path: int(Path(path).stem) < count // 2)]
    manifest = manifest.reset_index(drop=True)
    start = time.perf_counter()
    fingerprints = fingerprint_images(manifest, folder, scratch=folder.parent)
    decoded = time.perf_counter() - start
    # Otherwise this process ends only when its workers have been idle for five minutes.
    loky.get_reusable_executor().shutdown()
    start, used = time.perf_counter(), time.process_time()
    found = find_near_duplicates(fingerprints.thumbnails)
    compared, used = time.perf_counter() - start, time.process_time() - used
    print(
        f"{len(manifest):,} drawings: decoded in {decoded:.1f} s, compared in "
        f"{compared:.1f} s ({used:.1f} s of one core), {peak_memory(os.getpid()):.0f} MB, "
        f"{sum(map(len, found.groups)) - len(found.groups)} near duplicates"
    )
    if found.crowded:
        print(f"  {len(found.crowded)} resemble more than the {similar_pictures.MOST} compared")


def report_distances(folder: Path) -> None:
    """Print which pictures of a folder are nearest to each other."""
    manifest = manifest_of(folder)
    thumbnails = fingerprint_images(manifest, folder).thumbnails
    rows = []
    for found in similar_pictures.find_candidates(thumbnails, np.arange(len(thumbnails))):
        difference = alignment.aligned_difference(
            thumbnails[found.moved], thumbnails[found.fixed], found.matrix, found.shift
        )
        distance = alignment.excess(difference)
        first, second = np.sort([found.moved, found.fixed], axis=0)
        rows.append(pd.DataFrame({"first": first, "second": second, "distance": distance}))
    pairs = pd.concat(rows).sort_values("distance").drop_duplicates(["first", "second"])
    print(f"{folder.name}: {len(manifest)} pictures, {len(pairs)} pairs aligned")
    print(f"  {(pairs['distance'] <= 1).sum()} pairs count as one picture; those from 0.8 to 2:")
    for first, second, distance in pairs.to_numpy().tolist():
        if 0.8 <= distance < 2:
            names = manifest["path"].iloc[[int(first), int(second)]]
            print(f"  {distance:5.2f}  {'  '.join(names)}")


if __name__ == "__main__":
    run_command(main)
