"""The gate on what the real pipeline makes: models that are as good, better, and spoilt."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from tests.pipeline.conftest import Clone

pytestmark = pytest.mark.slow

# Enough for a model that is right on most of the test split, and for significance there.
PER_CLASS = 120
LEARNABLE = (
    "dataset=folder",
    "image.size=32",
    "split.test_fraction=0.4",
    "train.batch_size=8",
    "train.epochs=12",
    "train.learning_rate=0.005",
    "train.warmup_epochs=0",
    "train.keep=last",
    "train.batch_norm_momentum=0.5",  # so few steps
    # So that a spoilt model is refused for being worse than the one before it, not by a floor.
    "gate.floors.accuracy.at_least=0.1",
    "gate.floors.f1.at_least=0",
    "gate.floors.recall_female.at_least=0",
    "gate.floors.recall_male.at_least=0",
    "gate.floors.ece.at_most=1",
)

# Two ways to learn nothing; the third is to learn from labels that were shuffled.
SPOILT = {"untrained": {"epochs": 0}, "slow": {"learning_rate": 1e-7}}


def draw_faces(folder: Path) -> Path:
    """Draw noise whose mean brightness tells the class, but not always."""
    generator = np.random.default_rng(0)
    for name, brightness in (("female", 90), ("male", 180)):
        (folder / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            mean = generator.normal(brightness, 25)
            pixels = np.clip(mean + generator.normal(0, 30, (40, 40, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def learnt(new_clone: Callable[..., Clone], tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone whose main holds a model that has learnt; a branch has one that has not."""
    clone = new_clone()
    faces = draw_faces(tmp_path_factory.mktemp("faces") / "faces")
    clone.compose(*LEARNABLE, f"dataset.path={faces}")
    clone.run("dvc", "repro", "evaluate")
    clone.commit("a model that has learnt")
    spoil(clone, "untrained")
    return clone


def spoil(clone: Clone, how: str) -> None:
    """Make a branch of that name whose model is spoilt, unless it is there, and go back to main."""
    if clone.run("git", "branch", "--list", how).stdout:
        return
    clone.run("git", "switch", "--quiet", "--create", how, "main")
    clone.run("dvc", "checkout", "--quiet")
    if how == "shuffled":
        shuffle_labels(clone)
    else:
        path = clone.root / "params.yaml"
        params = yaml.safe_load(path.read_text())
        params["train"] |= SPOILT[how]
        path.write_text(yaml.safe_dump(params))
        ran = clone.ran(clone.run("dvc", "repro", "evaluate").stdout)
        # What is in the folder is listed each time.
        assert ran == ["list@folder", "train", "export", "evaluate"]
    clone.commit(how)
    clone.run("git", "switch", "--quiet", "main")


def shuffle_labels(clone: Clone) -> None:
    """Shuffle those of the training split, and train."""
    index = clone.root / "data/processed/train/index.csv"
    table = pd.read_csv(index, dtype=str)
    table["label"] = table["label"].sample(frac=1, random_state=0).to_numpy()
    index.unlink()  # the cache may hold the same file
    table.to_csv(index, index=False)
    # Or the stages would refuse what dvc.lock does not record.
    clone.run("dvc", "commit", "--force", "preprocess")
    for stage in ("train", "export", "evaluate"):
        clone.run("dvc", "repro", "--single-item", stage)


def gate(clone: Clone, *options: str) -> tuple[int, dict[str, Any]]:
    done = clone.run("facegender", "gate", "--format", "json", *options, check=False)
    assert "Traceback" not in done.stderr
    content = json.loads(done.stdout)
    assert content["exit_code"] == done.returncode
    return done.returncode, content


def at(clone: Clone, branch: str, *options: str) -> tuple[int, dict[str, Any]]:
    """Judge what a branch holds, and go back to main."""
    clone.run("git", "switch", "--quiet", branch)
    try:
        return gate(clone, *options)
    finally:
        clone.run("git", "switch", "--quiet", "main")


def accuracy(report: dict[str, Any]) -> dict[str, Any]:
    return report["comparisons"][0]


def test_the_same_run_passes(learnt: Clone) -> None:
    code, report = gate(learnt, "--baseline", "HEAD")
    assert (code, report["undecided"], report["warnings"]) == (0, [], [])
    assert report["paired"]
    assert report["flips"] == []
    # A model at chance would prove nothing.
    assert accuracy(report)["new"] > 0.7


@pytest.mark.parametrize(
    "branch",
    [
        "untrained",
        pytest.param("slow", marks=pytest.mark.campaign),
        pytest.param("shuffled", marks=pytest.mark.campaign),
    ],
)
def test_a_spoilt_model_is_refused(learnt: Clone, branch: str) -> None:
    spoil(learnt, branch)
    code, report = at(learnt, branch)
    assert code == 1
    assert "the merge base with main" in report["baseline"]
    assert accuracy(report)["new"] < 0.65
    assert accuracy(report)["verdict"] == "fail"
    assert accuracy(report)["high"] < 0
    assert [row["verdict"] for row in report["floors"]] == ["pass"] * 5


def test_cis_gate_writes_its_report(learnt: Clone, tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    learnt.run("git", "switch", "--quiet", "untrained")
    try:
        # The environment that runs this test, as `make install` would leave it.
        binaries = Path(learnt.environment()["PATH"].split(":")[0])
        (learnt.root / ".venv" / "bin").mkdir(parents=True)
        (learnt.root / ".venv" / "bin" / "facegender").symlink_to(binaries / "facegender")
        (learnt.root / ".venv" / "bin" / "python").write_text('#!/bin/sh\nexec python "$@"\n')
        (learnt.root / ".venv" / "bin" / "python").chmod(0o755)
        (learnt.root / ".venv" / "installed").touch()
        done = learnt.run(".ci/gate", check=False, GITHUB_STEP_SUMMARY=str(summary))
    finally:
        learnt.run("git", "switch", "--quiet", "main")
    assert done.returncode == 1
    text = summary.read_text()
    assert text.startswith("## Gate: fail\n")
    assert "| accuracy " in text
    assert "Images whose prediction changed" in text
    assert done.stdout.count("## Gate: fail") == 1
