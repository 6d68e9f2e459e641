"""Kill every stage at random moments with SIGKILL, and run plain `dvc repro` after each.

A small pipeline runs once undisturbed. Then, in each round, a new clone runs `dvc repro`, which is
killed in the first stage; then `dvc repro` again, which is killed in the second stage; and so on,
until the run after the last kill ends. At random, a kill takes DVC with all its processes or only
the stage's process. Every output must have the same bytes, except for ids of MLflow runs and times.
A kill counts as survived if `dvc repro` went on after it and the stage's outputs are the same. The
seed decides the moments, as shares of what each stage took undisturbed. If a kill cuts off DVC's
own `.dvc/tmp/rwlock`, the bench removes that file, as docs/reliability.md says, and reports it.

    make campaign
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from bench.clones import clone_head, environment, run
from bench.outputs import differences, output_digests
from facegender.files import parse_yaml
from facegender.runtime.entry_points import run_command

# Enough epochs that some kills hit one: TensorFlow takes seconds before the first.
SMALL = (
    "dataset.per_class=60",
    "dataset.image_size=48",
    "image.size=32",
    "train.epochs=60",
    "train.warmup_epochs=1",
)
# After a stage ends, DVC takes its outputs into the cache and writes dvc.lock: kill there too.
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
    survived = kills = resumed = 0
    with tempfile.TemporaryDirectory(prefix="facegender-") as folder:
        undisturbed = clone_head(Path(folder) / "undisturbed", [*SMALL, *args.set])
        seconds = run_by_stages(undisturbed)
        expected = output_digests(undisturbed)
        while kills < args.kills:
            clone = clone_head(Path(folder) / f"after{kills}", [*SMALL, *args.set])
            (clone / "dvc.lock").unlink(missing_ok=True)
            killed = []
            for stage in list(seconds)[: args.kills - kills]:
                share = chance.uniform(0, _SHARE_OF_STAGE)
                everything = chance.random() < 0.5
                where = kill_repro(clone, stage, share * seconds[stage], everything=everything)
                killed += [stage] if where else []
                print(f"{stage:<11} at {share:.2f} of it: {where or 'had ended'}", flush=True)
            remove_cut_lock(clone)
            run("dvc", "repro", cwd=clone)
            run("dvc", "status", "--quiet", cwd=clone)
            found = output_digests(clone)
            different = differences(expected, found)
            kills += len(killed)
            survived += sum(expected[stage] == found[stage] for stage in killed)
            resumed += clone.with_name(f"{clone.name}.log").read_text().count("goes on after epoch")
            print(f"{kills} kills: {', '.join(different) or 'all outputs bit-equal'}", flush=True)
            shutil.rmtree(clone)
    print(f"{survived} of {kills} end bit-equal; training was resumed {resumed} times")
    return int(survived < kills)


def run_by_stages(clone: Path) -> dict[str, float]:
    """Run the pipeline, and return the seconds that each stage took, in order."""
    seconds = {}
    for stage, entry in parse_yaml((clone / "dvc.yaml").read_text())["stages"].items():
        if "foreach" in entry:  # only for other sources than the sample
            continue
        dvc = start_repro(clone, "--force", "--single-item", stage)
        process = wait_for_stage(dvc, stage)
        start = time.monotonic()
        if process is not None:
            process.wait()
        seconds[stage] = time.monotonic() - start
        if dvc.wait():
            log = clone.with_name(f"{clone.name}.log").read_text()
            raise RuntimeError(f"dvc repro {stage} fails undisturbed: {log}")
    return seconds


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
            # In a shell's background job SIGINT is ignored, and child processes inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def wait_for_stage(dvc: subprocess.Popen[bytes], stage: str) -> psutil.Process | None:
    """Return the process of a stage once it runs, or None if DVC ends first."""
    children: list[psutil.Process] = []
    while dvc.poll() is None:
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(dvc.pid).children(recursive=True)
        for child in children:
            with suppress(psutil.NoSuchProcess):  # ended meanwhile, or a zombie
                words = child.cmdline()
                if f"stages.{stage}" in words and Path(words[0]).name.startswith("python"):
                    return child
        time.sleep(0.05)
    return None


def kill_repro(clone: Path, stage: str, seconds: float, *, everything: bool) -> str | None:
    """Run `dvc repro` and kill a stage some seconds after its start.

    Args:
        clone: root of the clone to run in.
        stage: name of the stage to kill.
        seconds: time from the stage's start to the kill; if it has ended by then, DVC is killed.
        everything: kill DVC and all its processes, not only the stage's.

    Returns:
        What was killed, or None if DVC had ended.
    """
    remove_cut_lock(clone)
    dvc = start_repro(clone)
    process = wait_for_stage(dvc, stage)
    if process is None and dvc.returncode:
        log = clone.with_name(f"{clone.name}.log").read_text()
        raise RuntimeError(f"dvc repro does not get to {stage}: {log[-2000:]}")
    time.sleep(seconds)
    running = process is not None and process.is_running()
    if process is not None and running and not everything:
        process.kill()
        dvc.wait()
        return "killed by itself"
    if dvc.poll() is not None:
        return None
    os.killpg(dvc.pid, signal.SIGKILL)
    dvc.wait()
    return "killed with DVC" if running else "had ended, DVC killed at what it did next"


def remove_cut_lock(clone: Path) -> None:
    """Remove DVC's rwlock if a kill cut it off, as docs/reliability.md says, and report it."""
    lock = clone / ".dvc" / "tmp" / "rwlock"
    try:
        json.loads(lock.read_text() if lock.exists() else "{}")
    except ValueError:
        lock.unlink()
        print("the kill cut off .dvc/tmp/rwlock: removed", flush=True)


if __name__ == "__main__":
    run_command(main)
