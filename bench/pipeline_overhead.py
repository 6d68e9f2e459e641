"""What DVC, MLflow and imports add to the work of the pipeline.

Runs `dvc repro` on the sample in a clone of the committed state, then each stage by itself under
Python's profiler. DVC's share is what the first takes longer than the second; imports and MLflow
are the profiler's cumulated seconds in Python's import and in facegender.tracking. The rest of the
stages is their work, with what Python needs to start and end.

    python -m bench.pipeline_overhead
"""

import argparse
import pstats
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from bench.clones import clone_head, run
from facegender.command import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
        clone = clone_head(Path(folder) / "clone")
        total = seconds_of("dvc", "repro", cwd=clone)
        lock = yaml.safe_load((clone / "dvc.lock").read_text())
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
    for out in stage["outs"]:
        path = clone / out["path"]
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, *words = shlex.split(stage["cmd"])
    stats = clone.parent / "stats"
    wall = seconds_of(sys.executable, "-m", "cProfile", "-o", str(stats), *words, cwd=clone)
    imports = mlflow = 0.0
    profiled = pstats.Stats(str(stats)).stats  # type: ignore[attr-defined]
    for (file, _, name), (_, _, _, cumulated, callers) in profiled.items():
        if name == "_find_and_load" and "importlib" in file:
            imports += cumulated
        if file.endswith("facegender/tracking.py") and name != "<module>":
            # Those that it calls itself are within the seconds of those that call them.
            mlflow += sum(
                times[3]
                for (caller, *_), times in callers.items()
                if not caller.endswith("facegender/tracking.py")
            )
    return wall, imports, mlflow


def seconds_of(*command: str, cwd: Path) -> float:
    start = time.perf_counter()
    run(*command, cwd=cwd)
    return time.perf_counter() - start


if __name__ == "__main__":
    run_command(main)
