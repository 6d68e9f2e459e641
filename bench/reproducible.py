"""Check that the committed state gives the same results twice, and measure other set-ups.

Clones HEAD into temporary folders, runs `dvc repro` in each from the start (no run cache, no shared
cache), and compares the bytes of every output, except for ids of MLflow runs and times. The exit
code is 1 if any differ; the first line names the first stage that does.

    make verify-reproducible

With `--set-ups` it runs the pipeline with one thread, with two, and without oneDNN, and prints how
much the metrics on the test split differ.

    python -m bench.reproducible --set-ups
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import pandas as pd

from bench.clones import clone_head, run
from bench.outputs import differences, output_digests
from facegender.runtime.dvc_context import pipeline_paths
from facegender.runtime.entry_points import run_command
from facegender.runtime.user_settings import KEEP

SET_UPS = {
    "2 threads": {"TF_NUM_INTRAOP_THREADS": "2", "TF_NUM_INTEROP_THREADS": "2"},
    "1 thread": {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"},
    "2 threads, no oneDNN": {
        "TF_NUM_INTRAOP_THREADS": "2",
        "TF_NUM_INTEROP_THREADS": "2",
        "TF_ENABLE_ONEDNN_OPTS": "0",
    },
}
METRICS = ("loss", "accuracy", "roc_auc", "ece")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set-ups", action="store_true", help="compare set-ups, by metrics")
    parser.add_argument("--set", "-S", action="append", default=[], help="parameters to change")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
        if args.set_ups:
            return compare_set_ups(Path(folder), args.set)
        return verify(Path(folder), args.set)


def verify(folder: Path, overrides: list[str]) -> int:
    digests = [output_digests(reproduce(folder / name, overrides)) for name in ("first", "second")]
    different = differences(*digests)
    count = sum(len(outputs) for outputs in digests[0].values())
    if not different:
        print(f"the same bytes twice: {count} outputs of {len(digests[0])} stages")
        return 0
    print(f"stage {different[0].split(':')[0]} is the first that differs", file=sys.stderr)
    print(f"{len(different)} of {count} outputs differ:", *different, sep="\n  ", file=sys.stderr)
    return 1


def compare_set_ups(folder: Path, overrides: list[str]) -> int:
    print(f"{'':<22}" + "".join(f"{name:>12}" for name in METRICS) + "  max |dP(male)|, flipped")
    expected: pd.DataFrame | None = None
    for number, (name, env) in enumerate(SET_UPS.items()):
        clone = reproduce(folder / str(number), overrides, **{KEEP: "1"}, **env)
        paths = pipeline_paths((clone / "dvc.yaml").read_text())
        metrics = json.loads((clone / paths["test_metrics"]).read_text())
        said = pd.read_csv(clone / paths["predictions"])
        expected = said if expected is None else expected
        apart = (said["probability"] - expected["probability"]).abs().max()
        flipped = (said["predicted"] != expected["predicted"]).sum()
        values = "".join(f"{metrics[metric]:12.4f}" for metric in METRICS)
        print(f"{name:<22}{values}  {apart:.2g}, {flipped} of {len(said)}", flush=True)
    return 0


def reproduce(target: Path, overrides: list[str], **env: str) -> Path:
    """Run the whole pipeline in a new clone, and return it."""
    clone = clone_head(target, overrides)
    run("dvc", "repro", "--force", "--no-run-cache", cwd=clone, **env)
    return clone


if __name__ == "__main__":
    run_command(main)
