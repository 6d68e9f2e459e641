"""Measure what deterministic kernels cost: train with and without them, in turns.

Each round trains MobileNet for a few epochs with params.yaml, once with `enable_op_determinism` and
once without. Each training has its own process, because TensorFlow cannot turn determinism off
again. The first epoch, in which TensorFlow builds its graph, does not count. Prints images per
second and their ratio; above 1, determinism is slower.

    python -m bench.determinism
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.common import make_raw, new_network, report
from facegender.params import load_params
from facegender.runtime.entry_points import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=4, help="epochs of each measurement")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deterministic", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is not None:
        print(images_per_second(args.part, args.epochs, deterministic=args.deterministic))
        return
    with_it, without = "with determinism", "without determinism"
    rates: dict[str, list[float]] = {with_it: [], without: []}
    with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
        part = make_part(Path(folder), args.images)
        command = [sys.executable, "-m", "bench.determinism"]
        command += ["--part", str(part), "--epochs", str(args.epochs)]
        for _ in range(args.rounds):
            for kind, option in ((with_it, ["--deterministic"]), (without, [])):
                done = subprocess.run(
                    [*command, *option], stdout=subprocess.PIPE, text=True, check=True
                )
                rates[kind].append(float(done.stdout.split()[-1]))
    report(rates, [(without, with_it)])


def make_part(folder: Path, images: int) -> Path:
    from facegender.data.preprocessing import write_split

    manifest = make_raw(folder / "raw", images)
    size = load_params(Path("params.yaml")).image.size
    write_split(manifest, folder / "raw", folder / "part", size=size, name="train")
    return folder / "part"


def images_per_second(directory: Path, epochs: int, *, deterministic: bool) -> float:
    import keras

    from facegender.data.processed import ProcessedSplit
    from facegender.training.train import make_deterministic, train_network

    params = load_params(Path("params.yaml"))
    if deterministic:
        make_deterministic(params.train.seed)
    else:
        keras.utils.set_random_seed(params.train.seed)
    network = new_network(
        params.image.size,
        params.model.alpha,
        dropout=params.model.dropout,
        batch_norm=params.train.batch_norm,
        batch_norm_momentum=params.train.batch_norm_momentum,
        seed=params.train.seed,
    )
    part = ProcessedSplit(directory)
    recipe = params.train.model_copy(update={"head_epochs": 0, "epochs": epochs})
    speed = train_network(network, part, part, recipe, verbose=0).speed
    return float(speed["images_per_second"].iloc[1:].median())


if __name__ == "__main__":
    run_command(main)
