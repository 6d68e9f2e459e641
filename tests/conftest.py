import gc
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings
from PIL import Image

from facegender.data.preprocessing import write_split
from facegender.data.processed import ProcessedSplit
from facegender.data.raw_manifest import build_manifest
from facegender.params import Params, load_params
from facegender.runtime.git import checked_git
from tools.compose_params import ROOT

# Runs the command line, for `run_python`.
FACEGENDER = "from facegender.cli.main import main; main()"

gc.set_threshold(50_000)  # as in facegender.runtime.entry_points

# A bounded number of examples, the same every time; `make fuzz` tries many more, at random.
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.register_profile(
    "fuzz",
    settings.get_profile("ci"),
    derandomize=False,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "5000")),
    print_blob=True,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# A command's prefix that makes the disk's permissions hold for root as well, as in a container.
WITH_PERMISSIONS = (
    ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
)


def run_command(*command: Any, check: bool = True, **options: Any) -> subprocess.CompletedProcess:
    """Run a command in the repository's root; options are subprocess.run's."""
    settings = {"cwd": ROOT, "capture_output": True, "text": True} | options
    done = subprocess.run(command, check=False, **settings)
    failed = f"{command} exits {done.returncode}\n{done.stdout}{done.stderr}"
    assert not check or done.returncode == 0, failed
    return done


def run_python(
    code: str, *words: object, prefix: tuple[str, ...] = (), **options: Any
) -> subprocess.CompletedProcess:
    """Run code in a process of its own, as `run_command` does."""
    return run_command(*prefix, sys.executable, "-c", code, *words, **options)


def init_repository(root: Path) -> None:
    """Make a folder a git repository whose branch is main, with a committer."""
    checked_git(root, "init", "--quiet", "--initial-branch=main")
    checked_git(root, "config", "user.name", "test")
    checked_git(root, "config", "user.email", "test@localhost")


def commit_all(root: Path, message: str = "test") -> str:
    """Commit everything in a repository, and return the commit."""
    checked_git(root, "add", "--all")
    checked_git(root, "commit", "--quiet", "--allow-empty", "--message", message)
    return checked_git(root, "rev-parse", "HEAD")


def run_and_measure(code: str, path: Path) -> tuple[str, float]:
    """Run code about `path` in a process of its own; return what it printed, and its megabytes."""
    head = f"from pathlib import Path; path = Path({str(path)!r})\n"
    # Not getrusage: its maximum counts what the process that started this one had.
    tail = "\nprint(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    printed, kilobytes = run_python(head + code + tail).stdout.strip().rsplit("\n", 1)
    return printed, int(kilobytes) / 1024


def tracked(*patterns: str) -> list[Path]:
    """Return the files of the repository that git does not ignore, or those of some patterns."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--"]
    listed = subprocess.run([*command, *patterns], cwd=ROOT, capture_output=True, check=True)
    names = sorted(set(listed.stdout.decode().split("\0")))
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def fill(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write files, by their paths in a folder, and return the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder, by its path in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def logged_model(run_id: str) -> Any:
    """Return MLflow's entity of the one model that a run logged."""
    import mlflow

    (model,) = mlflow.search_logged_models(
        [mlflow.get_run(run_id).info.experiment_id],
        f"source_run_id = '{run_id}'",
        output_format="list",
    )
    return model


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# What takes long begins first, so that none is left alone at the end: files of the quick tests, and
# groups of the pipeline. Of the first three groups, one needs the clone that others wait for.
SLOWEST = (
    *("test_training", "test_checkpoints", "test_user_settings"),
    *("swept", "test_strategy", "test_gate", "test_faults", "test_tracking_server", "test_score"),
)


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share a clone or a server on one worker, for `pytest --dist loadgroup`."""
    order = {}
    for item in items:
        shared = "swept" if "swept" in getattr(item, "fixturenames", ()) else item.path.stem
        item.add_marker(pytest.mark.xdist_group(shared))
        order[item] = SLOWEST.index(shared) if shared in SLOWEST else len(SLOWEST)
    items.sort(key=order.__getitem__)


@pytest.fixture(scope="session")
def params() -> Params:
    return load_params(ROOT / "params.yaml")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The portraits and weights beside the repository, which are not part of it."""
    folder = ROOT.parent / "shared"
    if not (folder / "faces" / "faces.csv").is_file():
        pytest.skip("needs ../shared with its portraits and weights")
    return folder


@pytest.fixture(scope="session")
def make_once(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Callable[[str, Callable[[Path], None]], Path]:
    """Return a function that fills a folder once for all pytest-xdist workers, and returns it.

    It takes the folder's name and a function that fills it. Tests must not change the folder.
    """
    ours = tmp_path_factory.getbasetemp()
    shared = ours if worker_id == "master" else ours.parent

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / name).exists():
                making = tmp_path_factory.mktemp(name)
                fill(making)
                making.rename(shared / name)
        return shared / name

    return make


@dataclass(frozen=True)
class Exported:
    """A small model, saved and exported, and images that it labels with more or less confidence."""

    keras: Path
    float32: Path
    int8: Path
    images: np.ndarray
    probabilities: np.ndarray


@pytest.fixture(scope="session")
def exported(make_once: Callable[[str, Callable[[Path], None]], Path]) -> Exported:
    folder = make_once("exported", export_small_model)
    models = (folder / name for name in EXPORTED)
    return Exported(*models, *(np.load(folder / f"{name}.npy") for name in ARRAYS))


EXPORTED = ("model.keras", "model.tflite", "model_int8.tflite")
ARRAYS = ("images", "probabilities")


def export_small_model(folder: Path) -> None:
    from sklearn.linear_model import Ridge

    from facegender.inference.export import convert
    from facegender.inference.threshold import write_threshold
    from facegender.model.saved_model import predict_arrays, save_model
    from tests.networks import small_network

    network = small_network(batch_norm_momentum=0.0, test_time_flip=True)
    generator = np.random.default_rng(0)
    brightness = np.linspace(0.2, 1, 64)
    generator.shuffle(brightness)
    noise = generator.uniform(0, 256, (64, 32, 32, 3))
    images = (noise * brightness[:, None, None, None]).astype(np.uint8)
    # Brighter images are more probably male; the answers are sure and unsure. Only the head learns,
    # and BatchNorm takes the statistics of these images: to train all takes longer.
    network.base(images / 127.5 - 1, training=True)
    features = network.features().predict_on_batch(images)
    learnt = Ridge(alpha=40.0).fit(features, 8 * (brightness - 0.7))
    network.head.set_weights([learnt.coef_[:, None], np.array([learnt.intercept_])])
    model = network.inference(slope=1 / 1.5)

    first, *others = (folder / name for name in EXPORTED)
    save_model(model, first)
    for path, content in zip(others, convert(model, images), strict=True):
        path.write_bytes(content)
        write_threshold(path, 0.5)
    for name, array in zip(ARRAYS, (images, predict_arrays(model, [images])), strict=True):
        np.save(folder / f"{name}.npy", array)


def write_images(
    folder: Path, per_class: int = 20, classes: tuple[str, ...] = ("female", "male")
) -> Path:
    """Fill a folder with small images that differ by class.

    Images of the second class are brighter, so that a model can learn them in a few steps.
    """
    generator = np.random.default_rng(0)
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.integers(0, 128, (40, 40, 3)) + 127 * (index % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:03}.png")
    return folder


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., Path]:
    """Return `write_images` for folders in the test's own, by default `raw`."""
    return lambda folder="raw", **settings: write_images(tmp_path / folder, **settings)


@pytest.fixture
def part(make_images: Callable[..., Path], tmp_path: Path) -> ProcessedSplit:
    raw = make_images(per_class=20)
    manifest = build_manifest(raw, female=["female"], male=["male"], ignore=[])
    assert write_split(manifest, raw, tmp_path / "part", size=32, name="train", jobs=1) == []
    return ProcessedSplit(tmp_path / "part")
