import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.compose import ROOT

# The pipeline in small: seconds, not minutes, and every stage for real.
SMALL = (
    "dataset.per_class=40",
    "dataset.image_size=48",
    "image.size=32",
    "train.epochs=2",
    "train.warmup_epochs=0",
    "evaluate.bootstrap_samples=200",
)


@dataclass(frozen=True)
class Clone:
    """A clone of the repository in a temporary folder."""

    root: Path

    def environment(self, **env: str) -> dict[str, str]:
        """Return the variables for commands: the environment's programs, no one's settings."""
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("DVC_", "MLFLOW_", "KAGGLE_", "GIT_"))
        }
        binaries = Path(sys.executable).parent
        return inherited | {"PATH": f"{binaries}{os.pathsep}{inherited['PATH']}"} | env

    def run(self, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess:
        """Run a command there, as a user in the environment would."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment(**env),
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{command} exits {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def experiment(
        self,
        *overrides: str,
        small: tuple[str, ...] = SMALL,
        options: tuple[str, ...] = (),
        check: bool = True,
    ) -> subprocess.CompletedProcess:
        """Run `dvc exp run` with the small parameters and others."""
        words = (word for item in (*small, *overrides) for word in ("-S", item))
        return self.run("dvc", "exp", "run", *options, *words, check=check)

    def compose(self, *overrides: str) -> None:
        self.run(sys.executable, "-m", "tests.compose", "params.yaml", *overrides)

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "--quiet", "--allow-empty", "--message", message)

    def ran(self, output: str) -> list[str]:
        """Return the stages that a `dvc repro` ran, from what it printed."""
        return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running ")]


# Not for the session: Playwright's event loop would run in the tests of other modules.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs chromium or google-chrome on PATH")
    with sync_playwright() as playwright:
        # Root, as in a container, cannot have Chromium's sandbox.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def copy_of(clone: Clone, tmp_path: Path) -> Clone:
    copied = Clone(tmp_path / "copy")
    shutil.copytree(clone.root, copied.root, symlinks=True)
    return copied


@pytest.fixture(scope="session")
def new_clone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Clone]:
    """Return a function that clones the work tree, as it is, with small parameters committed."""

    def make(*overrides: str) -> Clone:
        clone = Clone(tmp_path_factory.mktemp("clone") / "facegender")
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout.decode()
        for name in filter(None, listed.split("\0")):
            # Results belong to the committed parameters, not to the small ones.
            if (ROOT / name).is_file() and not name.startswith("metrics/") and name != "dvc.lock":
                (clone.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, clone.root / name)
        clone.run("git", "init", "--quiet", "--initial-branch=main")
        clone.run("git", "config", "user.name", "test")
        clone.run("git", "config", "user.email", "test@localhost")
        clone.compose(*SMALL, *overrides)
        clone.commit("start")
        return clone

    return make


@pytest.fixture(scope="session")
def reproduced(new_clone: Callable[..., Clone]) -> Clone:
    """A clone in which the pipeline has run once. Tests must leave its files as they found them."""
    clone = new_clone()
    clone.run("dvc", "repro")
    clone.commit("results")
    return clone
