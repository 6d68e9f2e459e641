"""Run the steps of a job of GitHub's workflow here, in their order and by bash, as GitHub does.

    .venv/bin/python .ci/workflow.py JOB [--skip NAME ...]

Steps that use an action are left out. GitHub's expressions are not evaluated: a variable that is
set by one has here the value that it has in the environment, or none. Each step has files of its
own for GITHUB_OUTPUT and, unless the environment names one, GITHUB_STEP_SUMMARY. The first step
that fails ends the job, but for steps with `if: always()`; exit code 1 then.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
KNOWN = {"env", "id", "if", "name", "run", "uses", "with"}


def main() -> int:
    """Run a job's steps and return 1 if one fails."""
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("job", choices=jobs)
    parser.add_argument("--skip", action="append", default=[], metavar="NAME")
    args = parser.parse_args()
    steps = jobs[args.job]["steps"]
    if unknown := set(args.skip) - {step.get("name") for step in steps}:
        parser.error(f"no step is called {', '.join(unknown)}")

    failed = False
    for step in steps:
        name = step.get("name", step.get("uses"))
        if set(step) - KNOWN or step.get("if", "always()") != "always()":
            raise NotImplementedError(f"step {name!r} has what this script does not know")
        if "run" not in step or name in args.skip or (failed and "if" not in step):
            print(f"== {name}: left out", flush=True)
            continue
        print(f"== {name}", flush=True)
        start = time.monotonic()
        code = run_step(step, jobs[args.job].get("env", {}))
        print(f"== {name}: exit code {code} after {time.monotonic() - start:.0f} s", flush=True)
        failed |= code != 0
    return int(failed)


def run_step(step: dict[str, Any], job_env: dict[str, Any]) -> int:
    """Run a step and return its exit code."""
    given = {
        key: os.environ.get(key, "") if "${{" in str(value) else str(value)
        for key, value in {**job_env, **step.get("env", {})}.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: str(Path(folder) / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")
        }
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=ROOT,
            env={**files, **os.environ, **given},
            check=False,
        )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
