"""Measure what `facegender score` costs compared with `predict`, and whether its memory grows.

Prints the seconds of both commands on the same folder of JPEGs, in turns, including the start, and
their ratio. Then it prints the peak memory of `score` at two numbers of images, of all its
processes together (Python, Java and Spark's workers; shared memory counts once), and, from the same
two runs, the images per second without the start. The images are 100 pictures repeated by hard
links. The model is a MobileNet with random weights: by default the study's, 1.0 for 224 pixels. A
smaller one ends sooner and shows more of what Spark adds. Linux only.

    python -m bench.score
    python -m bench.score --alpha 0.25 --size 96
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import psutil

import facegender
from bench.clones import environment
from bench.common import make_raw, new_network
from facegender.data.images import encode_png
from facegender.inference.export import convert
from facegender.runtime.entry_points import run_command
from facegender.tracking import connection, log, runs

_SAMPLE_SECONDS = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=20_000, help="to compare times")
    parser.add_argument("--rounds", type=int, default=1, help="times to run each command")
    parser.add_argument("--memory", type=int, nargs=2, default=[5_000, 50_000], help="images")
    parser.add_argument("--alpha", type=float, default=1.0, help="width of the MobileNet")
    parser.add_argument("--size", type=int, default=224, help="pixels a side of its input")
    parser.add_argument("--master", default=f"local[{os.cpu_count()}]", help="Spark's master")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
        root = Path(folder)
        model = log_random_model(root, args.alpha, args.size)
        program = str(Path(sys.executable).with_name("facegender"))
        for count in sorted({args.images, *args.memory}):
            make_raw(root / f"{count}", count)

        def score(count: int, output: str) -> tuple[float, float]:
            words = ["score", str(count), output, "--model", model, "--master", args.master]
            return watch([program, *words], root)

        predict = [program, "predict", "--csv", "--model", "model.tflite", str(args.images)]
        seconds: list[tuple[float, float]] = []
        for number in range(args.rounds):
            seconds.append((watch(predict, root)[0], score(args.images, f"out-{number}")[0]))
        for name, values in zip(("predict", "score"), zip(*seconds, strict=True), strict=True):
            median = statistics.median(values)
            rate = args.images / median
            print(f"{name:<8} {args.images:,} images {median:8.1f} s {rate:8.0f} images/s")
        ratios = [after / before for before, after in seconds]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"score / predict, of their times: {statistics.median(ratios):.2f} ({spread})")

        few, many = args.memory
        (short, before), (long, after) = score(few, "out-few"), score(many, "out-many")
        print(
            f"peak memory {before:,.0f} MB at {few:,} images, {after:,.0f} MB at {many:,}: "
            f"ratio {after / before:.2f}"
        )
        rate = (many - few) / (long - short)
        print(f"without the start of {short - few / rate:.1f} s: {rate:,.0f} images/s")


def log_random_model(root: Path, alpha: float, size: int) -> str:
    """Log an untrained model in a new store, as training does, and return its address."""
    (root / ".dvc").mkdir()
    network = new_network(size, alpha)
    pixels = np.random.default_rng(0).integers(0, 256, (32, size, size, 3), dtype=np.uint8)
    exported = root / "model.tflite"
    exported.write_bytes(convert(network.inference(), pixels)[0])
    connection.connect(root)
    with runs.training_run(name="bench", params={}, tags={}, manifests={}):
        log.log_model(
            exported,
            code=Path(facegender.__file__).parent,
            threshold=0.5,
            input_example=pd.DataFrame({"image": [encode_png(pixels[0])]}),
        )
    (logged,) = mlflow.search_logged_models(output_format="list")
    return f"models:/{logged.model_id}"


def watch(command: list[str], root: Path) -> tuple[float, float]:
    """Run a command; return its seconds and the peak memory of all its processes together, in MB.

    Pages that several processes share are counted once.
    """
    ended = threading.Event()
    peak = 0.0
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=root, env=environment(), stdout=subprocess.DEVNULL)

    def sample() -> None:
        nonlocal peak
        while not ended.wait(_SAMPLE_SECONDS):
            used = 0
            with suppress(psutil.NoSuchProcess):
                own = psutil.Process(process.pid)
                for each in (own, *own.children(recursive=True)):
                    with suppress(psutil.NoSuchProcess):
                        used += each.memory_full_info().pss
            peak = max(peak, used / 1e6)

    sampler = threading.Thread(target=sample)
    sampler.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    ended.set()
    sampler.join()
    if code:
        raise RuntimeError(f"{command} exits {code}")
    return seconds, peak


if __name__ == "__main__":
    run_command(main)
