"""Measure how fast images are preprocessed, compared with Pillow alone on the same files.

Prints images per second of preprocessing, of only decoding the JPEG files, and of decoding and
resizing them without writing; each with the same number of processes, in turns. Makes its own data
and removes them.

    python -m bench.preprocess
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import joblib
from PIL import Image

from bench.common import make_raw, measure, report
from facegender.data.preprocessing import write_split
from facegender.runtime.entry_points import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4000, help="JPEG files")
    parser.add_argument("--raw-size", type=int, default=200, help="their pixels a side")
    parser.add_argument("--size", type=int, default=224, help="pixels a side when processed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
        raw, part = Path(folder) / "raw", Path(folder) / "part"
        manifest = make_raw(raw, args.images, size=args.raw_size)
        paths = [raw / path for path in manifest["path"]]

        def preprocess() -> int:
            write_split(manifest, raw, part, size=args.size, name="train", jobs=args.jobs)
            return len(paths)

        def clear() -> None:
            shutil.rmtree(part, ignore_errors=True)

        def in_processes(function: Callable[..., None], *options: int) -> int:
            joblib.Parallel(args.jobs)(
                joblib.delayed(function)(paths[start : start + 64], *options)
                for start in range(0, len(paths), 64)
            )
            return len(paths)

        runs = {
            "preprocessing": preprocess,
            "decoding": lambda: in_processes(decode),
            "decoding and resizing": lambda: in_processes(decode_and_resize, args.size),
        }
        start = time.perf_counter()
        preprocess()
        first = len(paths) / (time.perf_counter() - start)
        clear()
        rates = measure(runs, args.rounds, clear=clear)
        print(f"{'preprocessing, with the start of processes':<44} {first:9,.0f} images/s")
        report(rates, [("preprocessing", "decoding"), ("preprocessing", "decoding and resizing")])


def decode(paths: list[Path]) -> None:
    for path in paths:
        with Image.open(path) as image:
            image.load()


def decode_and_resize(paths: list[Path], size: int) -> None:
    for path in paths:
        with Image.open(path) as image:
            image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    run_command(main)
