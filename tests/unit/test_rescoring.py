"""Another test set: the baseline's stored model is scored on it, and the models are paired."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from facegender.cli.main import _run
from facegender.data.images import encode_png
from facegender.data.manifest import write_table
from facegender.errors import UserError
from facegender.evaluation.metrics import classification_metrics
from facegender.files import file_sha256
from facegender.gate.rescoring import images_seen
from facegender.runtime.git import checked_git
from facegender.runtime.integrity import dvc_md5
from tests.conftest import Exported, commit_all, fill, init_repository
from tests.unit.conftest import cached_object, edit_params, store_object, store_splits
from tools.compose_params import ROOT

RESULTS = ("metrics/predictions.csv", "metrics/test.json")


class Project:
    """A repository whose baseline has a model, manifests and results on the first 40 of 64 images.

    Their labels are what the model says, so that it is right on all of them.
    """

    def __init__(self, root: Path, exported: Exported) -> None:
        self.root, self.model = root, exported.float32
        files = (".dvc/.gitignore", ".dvc/config", "dvc.yaml", "params.yaml")
        fill(root, {name: (ROOT / name).read_bytes() for name in files})
        edit_params(root, gate__floors={}, evaluate__groups=None)
        (root / "data/raw").mkdir(parents=True)
        names = [f"{number:02}.png" for number in range(64)]
        for name, pixels in zip(names, exported.images, strict=True):
            (root / "data/raw" / name).write_bytes(encode_png(pixels))
        digests = [file_sha256(root / "data/raw" / name) for name in names]
        probability = exported.probabilities.ravel()
        predicted = (probability >= 0.5).astype(int)
        self.table = pd.DataFrame(
            {
                "path": names,
                "label": predicted,
                "probability": probability,
                "predicted": predicted,
                "sha256": digests,
            }
        )
        self.write(self.table[:40])
        self.lock()
        init_repository(root)
        (root / ".gitignore").write_text("/data\n/.dvc/cache\n")
        commit_all(root)

    def write(self, table: pd.DataFrame) -> None:
        """Write predictions and their metrics."""
        (self.root / "metrics").mkdir(exist_ok=True)
        write_table(table, self.root / RESULTS[0])
        labels, male = (table[name].to_numpy() for name in ("label", "probability"))
        metrics = classification_metrics(labels, male, threshold=0.5)
        (self.root / RESULTS[1]).write_text(json.dumps(metrics))

    def lock(self, train: list[int] | None = None) -> None:
        """Record results, model and manifests, and store the last two in DVC's cache."""
        seen = self.table.iloc[train or []]
        recorded = {name: dvc_md5(self.root / name) for name in RESULTS}
        recorded |= {
            "models/model.tflite": store_object(self.root, self.model.read_bytes()),
            "data/splits": store_splits(self.root, train=seen, validation=self.table[:0]),
        }
        outs = [{"path": path, "md5": md5} for path, md5 in recorded.items()]
        (self.root / "dvc.lock").write_text(yaml.safe_dump({"stages": {"all": {"outs": outs}}}))

    def candidate(self, images: range | list[int], wrong: int = 0) -> pd.DataFrame:
        """Return predictions of images, of which the first are wrong."""
        table = self.table.iloc[list(images)].copy()
        flipped = table.index[:wrong]
        table.loc[flipped, "predicted"] = 1 - table.loc[flipped, "predicted"]
        table.loc[flipped, "probability"] = 1 - table.loc[flipped, "probability"]
        return table

    def judge(self, table: pd.DataFrame, **lock: Any) -> None:
        self.write(table)
        self.lock(**lock)


@pytest.fixture
def project(tmp_path: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    made = Project(tmp_path, exported)
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def gate(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, dict[str, Any]]]:
    def run(*options: str) -> tuple[int, dict[str, Any]]:
        code = _run(["gate", "--baseline", "HEAD", "--format", "json", *options])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize(("wrong", "code"), [(0, 0), (1, 0), (20, 1)])
def test_the_stored_model_is_scored_on_other_test_images(
    project: Project, gate: Callable, monkeypatch: pytest.MonkeyPatch, wrong: int, code: int
) -> None:
    monkeypatch.setattr("facegender.gate.rescoring._CHUNK", 16)
    # 24 of the 44 images are new. The model takes 32 pixels, where the parameters say 96.
    project.judge(project.candidate(range(20, 64), wrong))
    found, report = gate()
    assert (found, report["paired"], report["undecided"]) == (code, True, [])
    accuracy = report["comparisons"][0]
    assert (accuracy["n"], accuracy["old"], accuracy["new"]) == (44, 1, 1 - wrong / 44)
    assert len(report["flips"]) == wrong
    assert report["notes"][0].startswith("the test set changed, so the stored model of HEAD (")
    assert report["notes"][0].endswith("was scored on 44 images of the new one")


def test_a_threshold_that_the_models_file_lacks_is_named(
    project: Project, gate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.judge(project.candidate(range(20, 64)))
    assert not any("threshold" in note for note in gate()[1]["notes"])
    monkeypatch.setattr("facegender.gate.rescoring.read_threshold", lambda path: None)
    (note,) = (note for note in gate()[1]["notes"] if "threshold" in note)
    assert note.endswith("does not say its threshold: 0.5 is used")


def test_images_that_the_baseline_was_trained_on_do_not_count(
    project: Project, gate: Callable
) -> None:
    project.lock(train=[40, 41, 42, 43])
    commit_all(project.root, "trained on four")
    # The candidate is wrong on those four, and on no other.
    project.judge(project.candidate([40, 41, 42, 43, *range(20, 40)], wrong=4))
    code, report = gate()
    assert (code, report["comparisons"][0]["n"], report["comparisons"][0]["new"]) == (0, 20, 1)
    assert any(note.startswith("4 of 24 test images are not compared") for note in report["notes"])
    project.judge(project.candidate([40, 41, 42, 43]))
    code, report = gate()
    assert code == 2
    assert "one of the two models was trained or validated on every image" in report["undecided"][0]


def test_images_that_the_candidate_was_trained_on_do_not_count(
    project: Project, gate: Callable
) -> None:
    project.judge(project.candidate(range(20, 64)), train=[60, 61])
    assert gate()[1]["comparisons"][0]["n"] == 42


def test_without_the_manifests_it_says_that_it_could_not_check(
    project: Project, gate: Callable
) -> None:
    listing = next(
        out["md5"]
        for out in yaml.safe_load((project.root / "dvc.lock").read_text())["stages"]["all"]["outs"]
        if out["path"] == "data/splits"
    )
    project.judge(project.candidate(range(20, 64)), train=[63])
    cached_object(project.root, listing).unlink()
    code, report = gate()
    assert code == 0
    (note,) = (note for note in report["notes"] if "could not be checked" in note)
    assert "whether HEAD (" in note
    assert "there is no default remote" in note


def test_manifests_of_another_run_are_not_taken(project: Project) -> None:
    project.lock(train=[60, 61])
    paths = {"splits": "data/splits"}
    seen = images_seen(project.root, None, paths)
    assert seen == set(project.table["sha256"][60:62])
    stored = (path for path in (project.root / ".dvc/cache").rglob("*") if path.is_file())
    digests = [file_sha256(path)[:8] for path in stored if b"path,label" in path.read_bytes()]
    assert len(digests) == 2
    assert images_seen(project.root, None, paths, digests) == seen
    for others in ([], digests[:1], digests[1:]):
        with pytest.raises(UserError, match="not those that its run records"):
            images_seen(project.root, None, paths, others)


def test_a_baseline_without_predictions_is_scored(project: Project, gate: Callable) -> None:
    (project.root / RESULTS[0]).unlink()
    commit_all(project.root, "without predictions")
    project.judge(project.candidate(range(20, 64), wrong=20))
    code, report = gate()
    assert (code, report["paired"], report["comparisons"][0]["n"]) == (1, True, 44)


def test_a_model_is_fetched_from_the_remote_or_missed(
    project: Project, gate: Callable, tmp_path_factory: pytest.TempPathFactory
) -> None:
    project.judge(project.candidate(range(20, 64)))
    cache = project.root / ".dvc/cache/files"
    remote = tmp_path_factory.mktemp("remote")
    cache.rename(remote / "files")
    code, report = gate()
    assert code == 2
    (reason,) = (one for one in report["undecided"] if "cannot be scored" in one)
    assert "DVC's cache lacks it, and there is no default remote" in reason
    assert "`dvc push`" in reason
    assert "--accept-data-change compares the two unpaired" in reason
    code, report = gate("--accept-data-change")
    assert (code, report["paired"]) == (0, False)
    with (project.root / ".dvc/config").open("a") as file:
        file.write(f"    remote = there\n['remote \"there\"']\n    url = {remote}\n")
    code, report = gate()
    assert (code, report["paired"]) == (0, True)
    assert not any("could not be checked" in note for note in report["notes"])


def test_a_damaged_model_gets_no_verdict(project: Project, gate: Callable) -> None:
    project.judge(project.candidate(range(20, 64)))
    cached_object(project.root, dvc_md5(project.model)).write_bytes(b"damaged")
    code, report = gate()
    assert code == 2
    assert "its object in DVC's cache is damaged" in report["undecided"][0]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "raw/ lacks 1 of 44 test images"),
        (lambda path: path.write_bytes(path.with_name("31.png").read_bytes()), "30.png"),
    ],
    ids=["missing", "another"],
)
def test_the_pictures_must_be_those_of_the_predictions(
    project: Project, gate: Callable, spoil: Callable[[Path], object], says: str
) -> None:
    project.judge(project.candidate(range(20, 64)))
    spoil(project.root / "data/raw/30.png")
    code, report = gate()
    assert code == 2
    assert says in report["undecided"][0]


@pytest.mark.parametrize(("dropped", "code"), [(range(10), 2), (range(20, 30), 0)])
def test_a_test_set_chosen_by_the_models_errors_needs_to_be_accepted(
    project: Project, gate: Callable, dropped: range, code: int
) -> None:
    # The baseline is wrong on the first eight images.
    project.table.loc[:7, "label"] = 1 - project.table.loc[:7, "label"]
    project.judge(project.table[:40])
    commit_all(project.root, "with errors")
    project.judge(project.candidate([place for place in range(40) if place not in dropped]))
    found, report = gate()
    assert found == code
    if code:
        (reason,) = report["undecided"]
        assert reason.startswith("the 10 images that left the test set are harder than those")
        assert "is right on 0.2000 of them, and on 1.0000 of the others" in reason
        assert gate("--accept-data-change")[0] == 0


def test_blanked_metadata_of_another_test_set_are_the_baselines(
    project: Project, gate: Callable
) -> None:
    age = np.where(np.arange(64) < 40, "old", "young")
    project.table["age"] = age
    project.judge(project.table[:40])
    commit_all(project.root, "with ages")
    table = project.candidate(range(10, 64), wrong=30)
    project.judge(table.assign(age=np.where(table["age"] == "old", "young", table["age"])))
    code, report = gate()
    assert code == 1
    assert "age changed for 30 images: the baseline's is used" in report["notes"]
    (old,) = (row for row in report["groups"] if row["metric"] == "age=old")
    assert (old["n"], old["verdict"]) == (30, "fail")


def test_new_metadata_of_another_test_set_count_if_it_shares_no_image(
    project: Project, gate: Callable
) -> None:
    project.table["age"] = ["old", "young"] * 32
    project.judge(project.table[:40])
    commit_all(project.root, "with ages")
    project.judge(project.candidate(range(10, 64)).assign(hair=["long", "short"] * 27))
    _, report = gate()
    assert {row["metric"] for row in report["groups"]} == {"age=old", "age=young"}
    assert any(one.startswith("new in the metadata: hair; ") for one in report["notes"])
    # The data of somebody else.
    other = project.candidate(range(40, 64)).drop(columns="age").assign(hair=["a", "b"] * 12)
    project.judge(other)
    _, report = gate()
    assert {row["metric"] for row in report["groups"]} == {"hair=a", "hair=b"}
    assert not any("metadata" in one for one in report["notes"])


def test_a_reference_of_other_images_is_scored_too(project: Project, gate: Callable) -> None:
    checked_git(project.root, "tag", "release")
    edit_params(project.root, gate__reference="release")
    project.judge(project.candidate(range(20, 64)))
    commit_all(project.root, "other images")
    project.judge(project.candidate(range(20, 64), wrong=20))
    code, report = gate()
    assert code == 1
    assert report["reference"]["paired"]
    assert report["reference"]["comparisons"][0]["n"] == 44
    assert any("against the reference release" in one for one in report["failures"])
