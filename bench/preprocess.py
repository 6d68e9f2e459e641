"""Measure how fast images are preprocessed, compared with OpenCV, Pillow and tf.data.

Each decodes the same JPEG files, resizes them with a filter against aliasing, and writes uint8 rows
into one array on disk, with the same number of processes or threads; they take turns. Only
preprocessing also turns pictures upright, guards against hostile files and reports what it cannot
read. Small files, which are enlarged, come first, then photos of 12 megapixels. Needs OpenCV (`make
install-scale`).

    python -m bench.preprocess
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import joblib
import numpy as np
from PIL import Image

from bench.common import make_raw, measure, report
from facegender.data.preprocessing import write_split
from facegender.runtime.entry_points import run_command

_CHUNK = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=224, help="pixels a side when processed (224)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (the cores)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (5)")
    args = parser.parse_args()
    for images, raw_size in ((4000, 200), (128, 3464)):
        with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
            print(f"{images} JPEG files of {raw_size}x{raw_size} pixels:")
            compare(Path(folder), images, raw_size, args.size, args.jobs, args.rounds)


def compare(folder: Path, images: int, raw_size: int, size: int, jobs: int, rounds: int) -> None:
    """Print the images per second of each, and the ratios."""
    raw, split, array = folder / "raw", folder / "split", folder / "array.npy"
    manifest = make_raw(raw, images, size=raw_size, distinct=max(10, images // 40))
    paths = [raw / path for path in manifest["path"]]
    chunk = min(_CHUNK, max(1, images // (4 * jobs)))

    def preprocess() -> int:
        write_split(manifest, raw, split, size=size, name="train", jobs=jobs)
        return images

    def new_array() -> None:
        np.lib.format.open_memmap(array, "w+", np.uint8, (images, size, size, 3))

    def in_processes(function: Callable[[Path, int], np.ndarray]) -> int:
        new_array()
        joblib.Parallel(jobs)(
            joblib.delayed(write_rows)(function, paths[start : start + chunk], array, start, size)
            for start in range(0, images, chunk)
        )
        return images

    def in_tensorflow() -> int:
        new_array()
        rows = np.load(array, mmap_mode="r+", allow_pickle=False)
        for index, pixels in enumerate(tensorflow_pixels(paths, size, jobs)):
            rows[index] = pixels
        return images

    def clear() -> None:
        shutil.rmtree(split, ignore_errors=True)

    runs = {
        "preprocessing": preprocess,
        "OpenCV": lambda: in_processes(opencv_pixels),
        "Pillow": lambda: in_processes(pillow_pixels),
        "tf.data": in_tensorflow,
    }
    measure(runs, 1, clear=clear)  # processes start, and TensorFlow traces
    report(
        measure(runs, rounds, clear=clear),
        [("preprocessing", name) for name in runs if name != "preprocessing"],
    )


def write_rows(
    function: Callable[[Path, int], np.ndarray],
    paths: list[Path],
    array: Path,
    start: int,
    size: int,
) -> None:
    rows = np.load(array, mmap_mode="r+", allow_pickle=False)
    for row, path in enumerate(paths, start):
        rows[row] = function(path, size)


def opencv_pixels(path: Path, size: int) -> np.ndarray:
    import cv2

    cv2.setNumThreads(1)  # the processes use all cores already
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    assert pixels is not None
    # OpenCV's other filters alias when they reduce.
    filter_ = cv2.INTER_AREA if len(pixels) > size else cv2.INTER_CUBIC
    return cv2.resize(pixels, (size, size), interpolation=filter_)


def pillow_pixels(path: Path, size: int) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def tensorflow_pixels(paths: list[Path], size: int, jobs: int) -> Iterator[np.ndarray]:
    import tensorflow as tf

    def decode(path: tf.Tensor) -> tf.Tensor:
        pixels = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        resized = tf.image.resize(pixels, (size, size), method="bicubic", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)

    files = tf.data.Dataset.from_tensor_slices([str(path) for path in paths])
    return files.map(decode, num_parallel_calls=jobs).prefetch(_CHUNK).as_numpy_iterator()


if __name__ == "__main__":
    run_command(main)
