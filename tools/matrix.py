"""Run tests in the set-ups that other people's machines have, and print which pass.

Instruction sets, threads and oneDNN change the order in which TensorFlow adds, and so its last
bits. Programs that not everyone has are hidden from PATH; PostgreSQL's are also found outside it on
Debian (/usr/lib/postgresql), so remove the package to test without it.

    make matrix
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from facegender.runtime.user_settings import KEEP

OPTIONAL = ("chromium", "google-chrome", "java", "initdb", "psql", "postgres")
SET_UPS: Mapping[str, Mapping[str, str]] = {
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "no oneDNN": {"TF_ENABLE_ONEDNN_OPTS": "0"},
    "1 thread": {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"},
    "4 threads": {"OMP_NUM_THREADS": "4", "TF_NUM_INTRAOP_THREADS": "4"},
}


def main(command: list[str]) -> int:
    """Run a pytest command in each set-up; return 1 if it fails in any."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        bare = {"PATH": path_without(OPTIONAL, os.environ["PATH"], Path(folder))}
        for name, env in {**SET_UPS, "bare PATH": bare}.items():
            print(f"== {name}", flush=True)
            start = time.monotonic()
            done = subprocess.run(
                command,
                env={**os.environ, KEEP: "1", **env},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            print(done.stdout if done.returncode else "passed", flush=True)
            verdict = "FAILED" if done.returncode else "passed"
            summary = (done.stdout.strip().splitlines() or [""])[-1].strip("= ")
            lines.append((verdict, f"{name:<12}{time.monotonic() - start:>6.0f} s  {summary}"))
    print("", *(f"{verdict}  {line}" for verdict, line in lines), sep="\n")
    return int(any(verdict == "FAILED" for verdict, _ in lines))


def path_without(programs: Collection[str], path: str, folder: Path) -> str:
    """Return a PATH on which some programs are not found, and all others are.

    Args:
        programs: names to hide.
        path: the PATH to start from.
        folder: empty directory; directories with hidden programs are replaced by links in it.
    """
    entries = []
    for number, entry in enumerate(path.split(os.pathsep)):
        if any(shutil.which(program, path=entry) for program in programs):
            links = folder / str(number)
            links.mkdir()
            for file in Path(entry).iterdir():
                if file.name not in programs:
                    (links / file.name).symlink_to(file.absolute())
            entries.append(str(links))
        else:
            entries.append(entry)
    return os.pathsep.join(entries)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
