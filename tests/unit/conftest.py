import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache
from PIL import Image

import facegender
from facegender.data.images import encode_png
from facegender.data.manifest import write_table
from facegender.evaluation.metrics import classification_metrics
from facegender.params import Params, load_params
from facegender.runtime.git import checked_git
from facegender.tracking import connection, log, runs
from tests.conftest import Exported, init_repository
from tools.compose_params import ROOT, compose

# Whether each of 40 test images is predicted rightly, the first 20 of them female.
RUNS = {
    "good": [True] * 38 + [False] * 2,
    "better": [True] * 40,
    "worse": [True] * 8 + [False] * 12 + [True] * 20,
}


@pytest.fixture(scope="session")
def portrait(shared: Path) -> Image.Image:
    """A CC0 portrait."""
    with Image.open(shared / "faces" / "female" / "01.jpg") as picture:
        return picture.convert("RGB")


def two_faces(portrait: Image.Image) -> Image.Image:
    """Return a picture with a large face on the left and a smaller one on the right."""
    picture = Image.new("RGB", (900, 600), (120, 130, 110))
    picture.paste(portrait.resize((500, 500)), (30, 50))
    picture.paste(portrait.resize((300, 300)), (580, 200))
    return picture


@dataclass(frozen=True)
class Store:
    """A repository's root with an MLflow store that has a run for each of RUNS, evaluated."""

    root: Path
    runs: dict[str, str]


@pytest.fixture(scope="session")
def filled(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("store")
    return Store(root, {name: log_run(root, exported, name, right) for name, right in RUNS.items()})


def log_run(
    root: Path,
    exported: Exported,
    name: str,
    right: list[bool],
    manifest: pd.DataFrame | None = None,
) -> str:
    """Log a run as the pipeline does: its evaluation, its export and its model."""
    if manifest is None:
        paths = [f"{number:02}.png" for number in range(40)]
        labels = np.repeat([0, 1], 20)
        manifest = pd.DataFrame({"path": paths, "label": labels, "sha256": paths})
    labels = manifest["label"].to_numpy()
    predicted = np.where(right, labels, 1 - labels)
    probabilities = np.where(predicted == 1, 0.9, 0.1)
    files = root / "files" / name
    files.mkdir(parents=True, exist_ok=True)
    write_table(manifest, files / "manifest.csv")
    predictions = manifest.assign(probability=probabilities, predicted=predicted)
    write_table(predictions, files / "predictions.csv")
    metrics = classification_metrics(labels, probabilities, threshold=0.5)
    (files / "test.json").write_text(pd.Series(metrics).to_json())
    connection.connect(root)
    with runs.training_run(name=name, params={}, tags={}, manifests={}) as run:
        model_id = log.log_model(
            exported.float32,
            code=Path(facegender.__file__).parent,
            threshold=0.5,
            input_example=pd.DataFrame({"image": [encode_png(exported.images[0])]}),
        )
        log.log_numbers("test", metrics, model_id)
        log.log_files(
            files / "manifest.csv", metrics=[files / "test.json", files / "predictions.csv"]
        )
    return run.info.run_id


def cached_object(root: Path, md5: str) -> Path:
    """Return where DVC's cache has an object."""
    return root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]


def store_object(root: Path, content: bytes, ending: str = "") -> str:
    """Put an object into DVC's cache, and return its MD5."""
    md5 = hashlib.md5(content).hexdigest() + ending
    cached_object(root, md5).parent.mkdir(parents=True, exist_ok=True)
    cached_object(root, md5).write_bytes(content)
    return md5


def store_splits(root: Path, **manifests: pd.DataFrame) -> str:
    """Put a folder of manifests into DVC's cache, and return its MD5."""
    texts = {
        f"{name}.csv": table[["path", "label", "sha256"]].to_csv(index=False)
        for name, table in manifests.items()
    }
    listing = [
        {"md5": store_object(root, text.encode()), "relpath": name} for name, text in texts.items()
    ]
    return store_object(root, json.dumps(listing, sort_keys=True).encode(), ".dir")


ABSENT = object()


def edit_params(root: Path, **changes: object) -> None:
    """Set parameters by their dotted names, with __ in place of the dots; ABSENT deletes one."""
    path = root / "params.yaml"
    content = yaml.safe_load(path.read_text())
    for name, value in changes.items():
        *groups, last = name.split("__")
        branch = content
        for group in groups:
            branch = branch[group]
        branch[last] = value
        if value is ABSENT:
            del branch[last]
    path.write_text(yaml.safe_dump(content))


def composed(folder: Path, *overrides: str) -> Params:
    """Compose params.yaml in a folder, and read it."""
    compose(folder / "params.yaml", *overrides)
    return load_params(folder / "params.yaml")


def commit_params(root: Path, *before: str) -> str:
    """Commit params.yaml, after another command of git, if any; return the commit."""
    commit = ("commit", "--quiet", "--allow-empty", "--message", "rules")
    for words in filter(None, (before, ("add", "params.yaml"), commit)):
        checked_git(root, *words)
    return checked_git(root, "rev-parse", "HEAD")


@pytest.fixture
def store(filled: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The filled store, to change: a copy, chosen as the commands would choose it."""
    root = shutil.copytree(filled.root, tmp_path / "root")
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(ROOT / "params.yaml", root)
    floors = {"accuracy": {"at_least": 0.5}}
    edit_params(root, gate__floors=floors, evaluate__groups=None)  # these runs have no metadata
    init_repository(root)
    commit_params(root)
    # MLflow remembers where a run's artifacts are by its id, which all copies of the store share.
    _artifact_repos_cache.clear()
    connection.connect(root)
    return Store(root, filled.runs)


@pytest.fixture
def another_run(exported: Exported, store: Store) -> Callable[[str], str]:
    """Return a function that logs one more good run, by name."""
    return lambda name: log_run(store.root, exported, name, RUNS["good"])
