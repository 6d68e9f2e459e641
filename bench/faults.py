"""SIGKILL at random moments in every stage, each followed by plain `dvc repro`.

The pipeline runs once undisturbed, in small. Then, for each kill, a copy of the clone as it was
before a stage runs `dvc repro`; the stage is killed at a random moment, by turns with DVC and all
its processes or by itself, and `dvc repro` is called again. Every output must come out with the
same bytes (ids of MLflow runs and times excepted). The seed decides stages and moments, as shares
of what each stage took undisturbed.

    make faults
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from bench.clones import clone_head, environment, run
from bench.outputs import differences, output_digests
from facegender.command import run_command

# Enough epochs for a kill to fall between them.
SMALL = (
    "dataset.per_class=60",
    "dataset.image_size=48",
    "image.size=32",
    "train.epochs=8",
    "train.warmup_epochs=1",
    "evaluate.bootstrap_samples=200",
)
# Beyond the end of a stage, DVC takes its outputs into the cache and writes dvc.lock.
_SHARE_OF_STAGE = 1.1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--set", "-S", action="append", default=[], help="more parameters")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    equal = resumed = 0
    with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
        first = clone_head(Path(folder) / "before", [*SMALL, *args.set])
        reference, before = run_by_stages(first, Path(folder))
        expected = output_digests(reference)
        stages = list(before)
        for number in range(args.kills):
            stage = stages[number % len(stages)]
            snapshot, seconds = before[stage]
            clone = copy_clone(snapshot, Path(folder) / f"kill{number}")
            share = chance.uniform(0, _SHARE_OF_STAGE)
            everything = number // len(stages) % 2 == 0
            where = kill_repro(clone, stage, share * seconds, everything=everything)
            printed = run("dvc", "repro", cwd=clone)
            run("dvc", "status", "--quiet", cwd=clone)
            different = differences(expected, output_digests(clone))
            goes_on = "goes on after epoch" in printed
            equal += not different
            resumed += goes_on
            victim = "with DVC" if everything else "by itself"
            print(
                f"{number + 1:3} {stage:<11} {share:5.2f} of it, killed {victim}, {where}: "
                f"{', '.join(different) or 'bit-equal'}{', training resumed' if goes_on else ''}",
                flush=True,
            )
            shutil.rmtree(clone)
    print(f"{equal} of {args.kills} end bit-equal; {resumed} of them resumed training")
    return int(equal < args.kills)


def run_by_stages(clone: Path, folder: Path) -> tuple[Path, dict[str, tuple[Path, float]]]:
    """Run the pipeline stage by stage.

    Returns:
        The clone in which all have run; by stage, a copy from before it and its seconds.
    """
    before = {}
    for stage in yaml.safe_load((clone / "dvc.yaml").read_text())["stages"]:
        snapshot = copy_clone(clone, folder / f"before-{stage}")
        dvc = start_repro(clone, stage)
        process = wait_for_stage(dvc, stage)
        start = time.monotonic()
        if process is not None:
            process.wait()
        seconds = time.monotonic() - start
        if dvc.wait():
            log = clone.with_name(f"{clone.name}.log").read_text()
            raise RuntimeError(f"dvc repro {stage} fails undisturbed: {log}")
        before[stage] = (snapshot, seconds)
    return clone, before


def copy_clone(clone: Path, target: Path) -> Path:
    shutil.copytree(clone, target, symlinks=True)
    run("dvc", "cache", "dir", "--local", str(target / ".dvc" / "cache"), cwd=target)
    return target


def start_repro(clone: Path, *targets: str, **env: str) -> subprocess.Popen[bytes]:
    """Start `dvc repro` as the leader of a process group; what it prints is in CLONE.log."""
    with clone.with_name(f"{clone.name}.log").open("ab") as log:
        return subprocess.Popen(
            ["dvc", "repro", *targets],
            cwd=clone,
            env=environment(**env),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_for_stage(dvc: subprocess.Popen[bytes], stage: str) -> psutil.Process | None:
    """Return the process of a stage once it runs; None if DVC ends before."""
    while dvc.poll() is None:
        try:
            for child in psutil.Process(dvc.pid).children(recursive=True):
                words = child.cmdline()
                if f"stages.{stage}" in words and Path(words[0]).name.startswith("python"):
                    return child
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.05)
    return None


def kill_repro(clone: Path, stage: str, seconds: float, *, everything: bool) -> str:
    """Run `dvc repro` and kill a stage some seconds after its start.

    Args:
        clone: where.
        stage: which.
        seconds: from its start; if it has ended by then, DVC is killed at what it does next.
        everything: DVC and all its processes, or the stage's own process alone.

    Returns:
        What was running then.
    """
    dvc = start_repro(clone)
    process = wait_for_stage(dvc, stage)
    time.sleep(seconds)
    running = process is not None and process.is_running()
    if process is not None and running and not everything:
        process.kill()
        dvc.wait()
        return "at work"
    if dvc.poll() is not None:
        return "all had ended"
    os.killpg(dvc.pid, signal.SIGKILL)
    dvc.wait()
    return "at work" if running else "it had ended, DVC was at work"


if __name__ == "__main__":
    run_command(main)
