import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow.entities import Run
from playwright.sync_api import Browser, sync_playwright

from facegender.files import file_sha256
from facegender.tracking.connection import EXPERIMENT
from facegender.tracking.local_store import relocate
from tests.conftest import free_port, init_repository, run_command, tracked
from tools.compose_params import ROOT
from tools.ui import HOST, answers

# A server starts in about 10 s, or much later on a busy machine.
START_SECONDS = 300

# Enough epochs that a fault after the first comes before the last, and that the model learns.
EPOCHS = 12
# A small pipeline: every stage runs for real, in seconds instead of minutes.
SMALL = (
    "dataset.per_class=40",
    "dataset.image_size=48",
    "image.size=32",
    f"train.epochs={EPOCHS}",
    "train.warmup_epochs=0",
    "train.batch_norm_momentum=0.5",  # so few steps
)

# Variables of whoever runs the tests that must not reach a clone. The last ones are CI's: a clone
# that wrote to GITHUB_OUTPUT would replace the report on the pull request.
SETTINGS = ("DVC_", "MLFLOW_", "KAGGLE_", "GIT_", "GITHUB_", "BASELINE", "ACCEPT_")


@dataclass(frozen=True)
class Clone:
    """A clone of the repository in a temporary folder."""

    root: Path

    def environment(self, **env: str) -> dict[str, str]:
        """Return variables for commands: the environment's programs, no user's settings."""
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(SETTINGS)
        }
        binaries = Path(sys.executable).parent
        return inherited | {"PATH": f"{binaries}{os.pathsep}{inherited['PATH']}"} | env

    def run(self, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess:
        """Run a command there, as a user in the environment would."""
        environment = self.environment(**env)
        return run_command(*command, check=check, cwd=self.root, env=environment)

    def compose(self, *overrides: str) -> None:
        self.run(sys.executable, "-m", "tools.compose_params", "params.yaml", *overrides)

    def init(self) -> None:
        init_repository(self.root)

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "--quiet", "--allow-empty", "--message", message)

    def runs(self) -> list[Run]:
        """Return the runs in its own store, which becomes MLflow's here."""
        mlflow.set_tracking_uri(f"sqlite:///{self.root / 'mlflow.db'}")
        return mlflow.search_runs(experiment_names=[EXPERIMENT], output_format="list")

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
        options = ["--no-sandbox", "--use-fake-device-for-media-stream"]
        browser = playwright.chromium.launch(executable_path=program, args=options)
        yield browser
        browser.close()


def copy_of(clone: Clone, tmp_path: Path) -> Clone:
    copied = Clone(tmp_path / "copy")
    shutil.copytree(clone.root, copied.root, symlinks=True)
    return copied


@contextmanager
def running(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    ready: Callable[[], bool],
    cwd: Path | None = None,
) -> Iterator[subprocess.Popen]:
    """Run a server until the block ends; then SIGTERM, as a service manager sends it."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
            # It starts child processes; a process group can be stopped as a whole.
            start_new_session=True,
        )
    try:
        end = time.monotonic() + START_SECONDS
        while not ready():
            assert process.poll() is None, f"it ended\n{log.read_text()}"
            assert time.monotonic() < end, f"it does not answer\n{log.read_text()}"
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):  # what did not end with it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


@contextmanager
def served(
    clone: Clone,
    command: Sequence[str],
    log: Path,
    options: Sequence[str] = ("--host", HOST, "--workers", "1"),
) -> Iterator[int]:
    """Run an MLflow server on a free port until the block ends; yield the port."""
    port = free_port()
    environment = clone.environment(
        MLFLOW_DISABLE_TELEMETRY="true",
        DO_NOT_TRACK="true",
        # Its job workers are not needed here, and are slow to start.
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
    )
    words = [*command, *options, "--port", str(port)]
    with running(words, environment, log, lambda: answers(port), clone.root):
        yield port


def files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder, except .gitignore files."""
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".gitignore"
    }


def is_result(name: str) -> bool:
    """Return whether a tracked file is a result, which clones make with their own parameters."""
    return name.startswith("metrics/") or name in {"dvc.lock", "docs/model-card.md"}


@pytest.fixture(scope="session")
def new_clone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Clone]:
    """Return a function that clones the work tree, as it is, with small parameters committed."""

    def make(*overrides: str) -> Clone:
        clone = Clone(tmp_path_factory.mktemp("clone") / "facegender")
        for path in tracked():
            name = path.relative_to(ROOT).as_posix()
            if not is_result(name):
                (clone.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, clone.root / name)
        clone.init()
        clone.compose(*SMALL, *overrides)
        clone.commit("start")
        return clone

    return make


@pytest.fixture(scope="session")
def first_repro(
    new_clone: Callable[..., Clone], make_once: Callable[[str, Callable[[Path], None]], Path]
) -> Path:
    """A folder: in `facegender` a clone where `dvc repro` ran, in `stderr` what it printed."""

    def run_once(folder: Path) -> None:
        clone = new_clone()
        (folder / "stderr").write_text(clone.run("dvc", "repro").stderr)
        clone.commit("results")
        shutil.copytree(clone.root, folder / "facegender", symlinks=True)

    return make_once("first", run_once)


@pytest.fixture(scope="session")
def reproduced(first_repro: Path, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which the pipeline has run once. Tests must leave its files as they found them.

    Each of pytest-xdist's workers has a copy of its own.
    """
    clone = copy_of(Clone(first_repro / "facegender"), tmp_path_factory.mktemp("reproduced"))
    relocate(clone.root, EXPERIMENT)
    return clone


def write_grid(path: Path, epochs: list[int]) -> None:
    """Write a sweep's grid: the small parameters, with different epochs."""
    small = dict(item.split("=") for item in SMALL)
    grid = {key: yaml.safe_load(value) for key, value in small.items()}
    path.write_text(yaml.safe_dump(grid | {"train.epochs": epochs}))


@pytest.fixture(scope="session")
def swept(reproduced: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone with a sweep of four, three at a time: two train, one need not, one fails.

    Tests must leave its files as they found them.
    """
    clone = copy_of(reproduced, tmp_path_factory.mktemp("swept"))
    write_grid(clone.root.parent / "grid.yaml", [3, 4, EPOCHS, -1])
    done = clone.run(
        "facegender", "sweep", "../grid.yaml", "--jobs", "3", "--name", "sweep", check=False
    )
    (clone.root.parent / "printed").write_text(done.stdout + done.stderr)
    assert done.returncode == 1, done.stdout + done.stderr
    return clone
