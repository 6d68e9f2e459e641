"""Measure what DVC, MLflow and imports add to the work of the pipeline.

Runs `dvc repro` on the sample in a clone of the committed state, then each stage by itself, once
with Python's import timer and once with its profiler. DVC's share is the time by which `dvc repro`
exceeds the stages. MLflow's is the profiler's cumulative seconds in facegender.tracking: an upper
bound, because the profiler slows Python down and some imports are included. The rest is the stages'
own work, including the start and end of Python.

    python -m bench.pipeline_overhead
"""

import argparse
import pstats
import re
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.clones import clone_head, run
from facegender.files import parse_yaml
from facegender.runtime.entry_points import run_command

IMPORT = re.compile(r"^import time: +(\d+) \|", re.MULTILINE)
# Runs a stage without hide_native_notes, which would hide what the import timer prints.
SHOW_ALL = """
import contextlib, runpy, sys
from facegender.runtime import output_capture
output_capture.hide_native_notes = contextlib.nullcontext
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
        clone = clone_head(Path(folder) / "clone")
        total = seconds_of("dvc", "repro", cwd=clone)
        lock = parse_yaml((clone / "dvc.lock").read_text())
        rows = [(name, *profile(stage, clone)) for name, stage in lock["stages"].items()]
    print(f"{'stage':<12} {'wall':>8} {'imports':>8} {'MLflow':>8}   seconds")
    for name, wall, imports, mlflow in rows:
        print(f"{name:<12} {wall:8.1f} {imports:8.1f} {mlflow:8.1f}")
    wall, imports, mlflow = (sum(row[column] for row in rows) for column in (1, 2, 3))
    dvc = total - wall
    print(f"{'all':<12} {wall:8.1f} {imports:8.1f} {mlflow:8.1f}")
    print(f"dvc repro: {total:.1f} s, of which DVC itself {dvc:.1f} s")
    added = dvc + imports + mlflow
    print(f"added to the work: {added:.1f} s, {added / total:.2f} of the whole")


def profile(stage: dict[str, Any], clone: Path) -> tuple[float, float, float]:
    """Run a stage of dvc.lock by itself and return its seconds: all of it, imports, MLflow."""
    _, *words = shlex.split(stage["cmd"])  # python -m stages.NAME ...
    remove_outputs(stage, clone)
    start = time.perf_counter()
    printed = run(sys.executable, "-X", "importtime", "-c", SHOW_ALL, *words[1:], cwd=clone)
    wall = time.perf_counter() - start
    # import time: self [us] | cumulative | imported package
    imports = sum(int(microseconds) for microseconds in re.findall(IMPORT, printed)) / 1e6

    remove_outputs(stage, clone)
    stats = clone.parent / "stats"
    run(sys.executable, "-m", "cProfile", "-o", str(stats), *words, cwd=clone)
    return wall, imports, seconds_in_tracking(stats)


def remove_outputs(stage: dict[str, Any], clone: Path) -> None:
    for out in stage["outs"]:
        path = clone / out["path"]
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def seconds_in_tracking(stats: Path) -> float:
    seconds = 0.0
    for (file, _, name), (*_, callers) in pstats.Stats(str(stats)).stats.items():  # type: ignore[attr-defined]
        if "/facegender/tracking/" in file and name != "<module>":
            # Calls within tracking are already part of their callers' seconds.
            seconds += sum(
                times[3]
                for (caller, *_), times in callers.items()
                if "/facegender/tracking/" not in caller
            )
    return seconds


def seconds_of(*command: str, cwd: Path) -> float:
    start = time.perf_counter()
    run(*command, cwd=cwd)
    return time.perf_counter() - start


if __name__ == "__main__":
    run_command(main)
