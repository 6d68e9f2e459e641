"""Training by two worker processes, and on two devices of one process."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from facegender.data.processed import ProcessedSplit
from tests.conftest import free_port, run_command, write_images
from tests.pipeline.conftest import HOST, SMALL, Clone

pytestmark = pytest.mark.scale

# Two cores may have other work.
PATIENCE = 300
WAIT = {"FACEGENDER_WORKER_WAIT": str(PATIENCE)}
METRICS = ["loss", "accuracy", "val_loss", "val_accuracy"]

# Each device draws other numbers than a single one would, so nothing is drawn here. All
# batches can be halved. BatchNorm is frozen, as in the recipe `best`: with the statistics of a few
# images of one pixel, as the last layers have here, differences of rounding grow.
EQUAL = (
    "train.epochs=5",
    "train.batch_norm=frozen",
    "train.learning_rate=0.0001",
    "train.min_steps_per_epoch=8",
    "split.validation_fraction=0.14",
    "model.dropout=0.0",
    "train.augmentation.zoom=0.0",
    "train.augmentation.width_shift=0.0",
    "train.augmentation.height_shift=0.0",
    "train.augmentation.horizontal_flip=false",
)


@dataclass(frozen=True)
class Alone:
    """A clone in which one process has trained, and the parameters that it had."""

    clone: Clone
    params: tuple[str, ...]


@pytest.fixture(scope="module")
def alone(new_clone: Callable[..., Clone], tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """A clone in which one process has trained.

    Its pictures are noise. In the sample's, large areas have one colour, and where their activation
    comes to a bend of ReLU6, rounding decides the gradient of all of an area.
    """
    from tests.networks import pretrained  # TensorFlow, for which not all workers should wait

    folder = tmp_path_factory.mktemp("noise")
    faces = write_images(folder / "faces", per_class=40)
    params = ("dataset=folder", f"dataset.path={faces}", *SMALL[2:], *EQUAL)
    clone = new_clone()
    clone.compose(*params)
    clone.run("dvc", "repro", "preprocess")
    part = ProcessedSplit(clone.root / "data" / "processed" / "train")
    assert len(part) % 2 == 0
    params += (f"model.weights={pretrained(part, folder / 'start.weights.h5')}",)
    clone.compose(*params)
    clone.run("dvc", "repro", "train")
    clone.commit("results")
    return Alone(clone, params)


def machines(alone: Alone, folder: Path) -> tuple[Clone, Clone]:
    """Two clones as on two machines: what is trained is to be trained by both."""
    chief, worker = Clone(folder / "chief"), Clone(folder / "worker")
    for clone in (chief, worker):
        shutil.copytree(alone.clone.root, clone.root, symlinks=True)
    chief.compose(*alone.params, "train.strategy=multi_worker")
    return chief, worker


def cluster() -> Callable[[int], str]:
    """Return a function that gives TF_CONFIG of each of two workers at free ports."""
    addresses = [f"{HOST}:{free_port()}" for _ in range(2)]
    return lambda index: json.dumps(
        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    )


@contextmanager
def started(clone: Clone, *command: str, **env: str) -> Iterator[subprocess.Popen]:
    """Run a command until the block ends; its output goes to a file beside the clone."""
    environment = clone.environment(**WAIT, **env)
    with clone.root.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, cwd=clone.root, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def printed(clone: Clone) -> str:
    return clone.root.with_suffix(".log").read_text()


def files(clone: Clone) -> dict[str, int]:
    """Return the time of the last change of each file, but for Python's own cache."""
    return {
        str(path.relative_to(clone.root)): path.stat().st_mtime_ns
        for path in clone.root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def wait_for_checkpoint(clone: Clone, process: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE
    while not list((clone.root / ".dvc" / "tmp" / "facegender").glob("*.npz")):
        assert process.poll() is None, printed(clone)
        assert time.monotonic() < end, printed(clone)
        time.sleep(0.01)


def runs(clone: Clone) -> int:
    done = clone.run("mlflow", "runs", "list", "--experiment-id", "1")
    return sum("repro" in line for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def together(alone: Alone, tmp_path_factory: pytest.TempPathFactory) -> tuple[Clone, Clone, dict]:
    """Two clones that trained together, and the files that the worker had before."""
    chief, worker = machines(alone, tmp_path_factory.mktemp("together"))
    before, config = files(worker), cluster()
    with started(worker, "facegender", "worker", TF_CONFIG=config(1)) as process:
        chief.run("dvc", "repro", "train", TF_CONFIG=config(0), **WAIT)
        assert process.wait(PATIENCE) == 0, printed(worker)
    return chief, worker, before


def test_two_workers_train_as_one(alone: Alone, together: tuple[Clone, Clone, dict]) -> None:
    one, two = (
        pd.read_csv(clone.root / "metrics" / "history.csv") for clone in (alone.clone, together[0])
    )
    assert one["loss"][2] < one["loss"][0] - 0.01  # it learns
    assert (one[METRICS] != two[METRICS]).any(axis=None)  # by other sums than one does
    assert (one[METRICS] - two[METRICS])[:3].abs().max(axis=None) < 1e-3


def test_the_chief_alone_writes_and_logs(alone: Alone, together: tuple[Clone, Clone, dict]) -> None:
    chief, worker, before = together
    assert files(worker) == before
    assert "helped to train 5 epochs" in printed(worker)
    assert runs(chief) == runs(alone.clone) + 1
    model = (clone.root / "models" / "model.keras" for clone in (alone.clone, chief))
    assert len({path.read_bytes() for path in model}) == 2


@pytest.mark.campaign  # in short: a killed chief, which is noticed in the same way
def test_a_killed_worker_stops_the_training_which_then_goes_on(
    alone: Alone, together: tuple[Clone, Clone, dict], tmp_path: Path
) -> None:
    chief, worker = machines(alone, tmp_path)
    config = cluster()
    with (
        started(worker, "facegender", "worker", TF_CONFIG=config(1)) as victim,
        started(chief, "dvc", "repro", "train", TF_CONFIG=config(0)) as process,
    ):
        wait_for_checkpoint(chief, process)
        victim.kill()
        assert process.wait(PATIENCE) != 0
    assert "error: A worker is gone" in printed(chief)
    assert "Traceback" not in printed(chief)
    assert not (chief.root / "models" / "model.keras").exists()

    with started(worker, "facegender", "worker", TF_CONFIG=config(1)) as process:
        again = chief.run("dvc", "repro", "train", TF_CONFIG=config(0), **WAIT)
        assert process.wait(PATIENCE) == 0, printed(worker)
    assert "training goes on after epoch" in again.stderr
    for name in ("metrics/history.csv", "models/model.keras"):
        uninterrupted = together[0].root / name
        assert (chief.root / name).read_bytes() == uninterrupted.read_bytes(), name


def test_a_chief_that_is_killed_stops_the_worker(alone: Alone, tmp_path: Path) -> None:
    chief, worker = machines(alone, tmp_path)
    config = cluster()
    stage = next(
        line.split("> ")[1].split()
        for line in chief.run("dvc", "repro", "--dry", "train").stdout.splitlines()
        if line.startswith("> python -m stages.train")
    )
    with (
        started(worker, "facegender", "worker", TF_CONFIG=config(1)) as process,
        started(chief, *stage, TF_CONFIG=config(0)) as victim,
    ):
        wait_for_checkpoint(chief, victim)
        victim.kill()
        assert process.wait(PATIENCE) != 0
    assert "error: A worker is gone" in printed(worker)
    assert "Traceback" not in printed(worker)


def on_two_devices(part: ProcessedSplit, recipe: dict) -> tuple[dict, dict]:
    """Train on one device and on two, in a process of its own."""
    weights = part.directory.with_name("start.weights.h5")
    words = ("tests.scale.mirrored", part.directory, json.dumps(recipe), weights)
    done = run_command(sys.executable, "-m", *words)
    one, two = json.loads(done.stdout.splitlines()[-1])
    return one, two


BEST = {
    "batch_size": 20,
    "head_epochs": 1,
    "head_learning_rate": 0.01,
    "epochs": 2,
    "warmup_epochs": 0,
    "min_steps_per_epoch": 8,
    "learning_rate": 0.001,
    "batch_norm": "frozen",
    "small_image_size": 32,
    "small_epochs": 1,
    "ema_epochs": 0.5,
    "weight_decay": 0.01,
    "class_weights": "balanced",
}


@pytest.mark.campaign  # in short: two processes, above, and the test below
def test_two_devices_train_as_one(part: ProcessedSplit) -> None:
    one, two = on_two_devices(part, BEST)
    assert one["history"]["loss"][2] < one["history"]["loss"][1] - 0.02  # it learns
    for name in METRICS:
        assert one["history"][name] == pytest.approx(two["history"][name], abs=1e-3), name
    assert one["answers"] == pytest.approx(two["answers"], abs=1e-3)


def test_two_devices_share_the_statistics_of_batch_norm(part: ProcessedSplit) -> None:
    # Two steps: more would show how differences of rounding grow (see EQUAL).
    one, two = on_two_devices(part, {"batch_size": 20, "epochs": 1, "optimizer": "sgd"})
    for name in METRICS:
        assert one["history"][name] == pytest.approx(two["history"][name], abs=1e-3), name


@pytest.mark.campaign  # in short: on one device, in test_training.py
def test_two_devices_train_in_mixed_precision(part: ProcessedSplit) -> None:
    one, two = on_two_devices(part, BEST | {"mixed_precision": True})
    assert one["history"]["loss"][2] < one["history"]["loss"][1] - 0.02
    assert one["history"]["loss"] == pytest.approx(two["history"]["loss"], abs=0.05)
