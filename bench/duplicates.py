"""Measure what near duplicates cost to find, and how far different pictures are from the limits.

Prints how many images are checked a second, and how long it takes to compare many hashes; then, for
the sample and for each folder given, the nearest different pictures, as multiples of the limits in
`facegender.data.near_duplicates`.

    python -m bench.duplicates ../shared/faces
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from bench.common import make_raw
from facegender.data import near_duplicates as duplicates
from facegender.data.checks import fingerprint_images
from facegender.data.fingerprints import Fingerprint, take_fingerprints
from facegender.data.image_files import find_images
from facegender.data.sources.sample import draw_sample
from facegender.runtime.entry_points import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="folders of different pictures")
    parser.add_argument("--images", type=int, default=4000, help="JPEG files to check")
    parser.add_argument("--hashes", type=int, default=60000, help="hashes to compare")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
        raw, sample = Path(folder) / "raw", Path(folder) / "sample"
        manifest = make_raw(raw, args.images)
        fingerprint_images(manifest[:64], raw, jobs=args.jobs)  # starts the processes
        start = time.perf_counter()
        fingerprint_images(manifest, raw, jobs=args.jobs)
        rate = len(manifest) / (time.perf_counter() - start)
        print(f"{'checking images of 200 x 200 pixels':<44} {rate:9,.0f} images/s")
        hashes = np.random.default_rng(0).integers(0, 2**64, (args.hashes, 5), dtype=np.uint64)
        start = time.process_time()
        duplicates.find_near_duplicates(hashes, np.zeros((args.hashes, 1), np.uint8))
        seconds = time.process_time() - start
        print(f"{f'comparing {args.hashes:,} hashes':<44} {seconds:9.1f} s of one core")
        sample.mkdir()
        draw_sample(sample, per_class=600, image_size=128, seed=42)
        for name, path in [("sample", sample), *((path.name, path) for path in args.folders)]:
            report_distances(name, path)


def report_distances(name: str, folder: Path) -> None:
    """Print how far apart the nearest pictures of a folder are."""
    paths = [folder / path for path in find_images(folder)]
    taken = [item for item in take_fingerprints(paths) if isinstance(item, Fingerprint)]
    hashes = np.stack([item.hashes for item in taken])
    thumbnails = np.stack([item.thumbnail for item in taken])
    pairs = [pair for some in duplicates._similar_hashes(hashes) for pair in some]
    print(f"{name}: {len(taken)} pictures, {len(pairs)} pairs have near hashes")
    if not pairs:
        return
    start = time.perf_counter()
    distances = []
    for start_index in range(0, len(pairs), 256):
        first, second = np.transpose(pairs[start_index : start_index + 256])
        both = [
            duplicates.aligned_difference(thumbnails[a], thumbnails[b])
            for a, b in ((first, second), (second, first))
        ]
        distances.append(np.minimum(*both))
    seconds = time.perf_counter() - start
    table = pd.DataFrame(np.concatenate(distances, axis=1).T, columns=["rms", "local"])
    # How far a pair is from counting as a duplicate: the larger of the two ratios decides.
    table["of the limits"] = np.maximum(
        table["rms"] / duplicates.MAX_RMS, table["local"] / duplicates.MAX_LOCAL
    )
    print(f"aligning them takes {1000 * seconds / len(pairs):.1f} ms a pair; the nearest:")
    print(table.nsmallest(5, "of the limits").round(2).to_string(index=False))


if __name__ == "__main__":
    run_command(main)
