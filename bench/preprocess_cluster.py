"""Measure how fast a Dask cluster preprocesses images, compared with local processes.

Prints images per second with joblib's processes (loky), and with a Dask scheduler and workers of
one thread each, all on this machine, in turns. On one machine a cluster can only be slower; this
shows by how much. Also prints the peak memory of this process and of the workers. Makes its own
data and removes them.

    python -m bench.preprocess_cluster
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.common import make_raw, measure, peak_memory, report
from facegender.data.preprocessing import write_split
from facegender.runtime.entry_points import run_command

HOST = "127.0.0.1"
START_SECONDS = 120


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4000, help="JPEG files")
    parser.add_argument("--raw-size", type=int, default=200, help="their pixels a side")
    parser.add_argument("--size", type=int, default=224, help="pixels a side when processed")
    parser.add_argument("--workers", type=int, default=2, help="workers, and processes")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="facegender-") as name:
        folder = Path(name)
        raw, part = folder / "raw", folder / "part"
        manifest = make_raw(raw, args.images, size=args.raw_size)

        def preprocess(scheduler: str | None) -> int:
            write_split(
                manifest,
                raw,
                part,
                size=args.size,
                name="train",
                jobs=args.workers,
                scheduler=scheduler,
            )
            return len(manifest)

        def clear() -> None:
            shutil.rmtree(part, ignore_errors=True)

        with local_cluster(folder) as cluster:
            for _ in range(args.workers):
                cluster.start_worker()
            runs = {
                f"loky, {args.workers} processes": lambda: preprocess(None),
                f"Dask, {args.workers} workers": lambda: preprocess(cluster.address),
            }
            measure(runs, 1, clear=clear)  # processes and workers import what they need
            rates = measure(runs, args.rounds, clear=clear)
            peaks = [peak_memory(worker.pid) for worker in cluster.workers]
    loky, dask = runs
    report(rates, [(dask, loky)])
    print(
        f"peak memory at {args.images:,} images: {peak_memory(os.getpid()):,.0f} MB here, "
        f"{max(peaks):,.0f} MB in the largest worker"
    )


@dataclass
class Cluster:
    """A Dask scheduler on this machine, and the workers that were started for it."""

    folder: Path
    address: str
    scheduler: subprocess.Popen
    workers: list[subprocess.Popen] = field(default_factory=list)

    def start_worker(self, **environment: str) -> subprocess.Popen:
        """Start a worker with one thread; nothing restarts it when it is killed."""
        worker = _start(
            self.folder / f"worker{len(self.workers)}.log",
            *("worker", self.address, "--nthreads", "1", "--no-nanny", "--host", HOST),
            *("--local-directory", str(self.folder)),
            **environment,
        )
        self.workers.append(worker)
        return worker


@contextmanager
def local_cluster(folder: Path, **environment: str) -> Iterator[Cluster]:
    """Run a scheduler on a free port until the block ends, then stop it and its workers.

    Args:
        folder: directory for logs and the workers' temporary files.
        environment: extra variables for the scheduler.
    """
    log, told = folder / "scheduler.log", folder / "scheduler.json"
    told.unlink(missing_ok=True)
    scheduler = _start(
        log,
        *("scheduler", "--host", HOST, "--port", "0", "--scheduler-file", str(told)),
        **environment,
    )
    workers: list[subprocess.Popen] = []
    try:
        address = None
        end = time.monotonic() + START_SECONDS
        while address is None:
            if scheduler.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the scheduler does not start\n{log.read_text()}")
            time.sleep(0.1)
            with suppress(FileNotFoundError, json.JSONDecodeError):
                address = json.loads(told.read_text())["address"]
        yield Cluster(folder, address, scheduler, workers)
    finally:
        for process in [*workers, scheduler]:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _start(log: Path, *command: str, **environment: str) -> subprocess.Popen:
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *command, "--no-dashboard"],
            # Not the root of the repository, so that workers import the installed package.
            cwd=log.parent,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Its own process group, which can be stopped with all its children.
            start_new_session=True,
        )


if __name__ == "__main__":
    run_command(main)
