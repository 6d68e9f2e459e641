"""Clone the committed state, and run the pipeline there with a separate cache."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from facegender.runtime.dvc_context import project_root


def clone_head(target: Path, overrides: Sequence[str] = ()) -> Path:
    """Clone the repository's HEAD to `target`, and compose its parameters if any are overridden.

    The clone has its own DVC cache, whatever cache DVC's configuration names.
    """
    run("git", "clone", "--quiet", str(project_root()), str(target), cwd=target.parent)
    run("dvc", "cache", "dir", "--local", str(target / ".dvc" / "cache"), cwd=target)
    if overrides:
        run(sys.executable, "-m", "tools.compose_params", "params.yaml", *overrides, cwd=target)
    return target


def environment(**env: str) -> dict[str, str]:
    """Return variables for a clone: this environment's programs, without the user's settings."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("DVC_", "MLFLOW_", "GIT_"))
    }
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
    return inherited | {"PATH": binaries} | env


def run(*command: str, cwd: Path, **env: str) -> str:
    """Run a command in a clone and return what it printed.

    Raises:
        RuntimeError: the command failed; holds all that it printed.
    """
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exits {done.returncode}: {done.stdout}")
    return done.stdout
