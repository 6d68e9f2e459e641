import json
import math
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import mlflow
import pytest
import yaml

from facegender.cli.main import _run
from facegender.cli.seeds import spread_of, why_undecided
from facegender.errors import UserError
from facegender.gate.verdict import Report
from facegender.runtime.dvc_context import TRAINED_BY, input_tags, read_lock
from facegender.runtime.experiment_clone import Snapshot, make_clone, take_snapshot
from facegender.runtime.git import checked_git
from facegender.runtime.output_capture import KEPT_CHARACTERS, KeptOutput
from facegender.runtime.sweep import (
    _RUN,
    Ended,
    Point,
    _end,
    _log_restored,
    different_losses,
    grid_points,
    read_grid,
    run_sweep,
)
from facegender.tracking import connection
from tests.conftest import commit_all, fill, init_repository
from tests.unit.conftest import composed
from tools.compose_params import ROOT, compose


def test_the_grid_of_make_sweep_is_valid(tmp_path: Path) -> None:
    points = grid_points(read_grid(ROOT / "conf" / "sweep.yaml"), "sweep")
    assert [point.name for point in points] == [f"sweep-{n}" for n in range(1, len(points) + 1)]
    for point in points:
        params = composed(tmp_path, *point.overrides)
        assert params.train.learning_rate == point.values["train.learning_rate"]


def test_every_combination_comes_once() -> None:
    points = grid_points({"a": [1, 2], "b": ["x"], "c": [True, None]}, "g")
    assert [(point.name, *point.values.values()) for point in points] == [
        ("g-1", 1, "x", True),
        ("g-2", 1, "x", None),
        ("g-3", 2, "x", True),
        ("g-4", 2, "x", None),
    ]


def test_values_arrive_as_they_are_in_the_file(tmp_path: Path) -> None:
    """Hydra reads overrides by a grammar of its own."""
    values = {
        "train.learning_rate": 1e-05,
        "train.calibrate": False,
        "train.small_image_size": None,
        "model.weights": "/home/a b/weights, (new) = 'best' \"{1}\" \\d\\ jörg.h5",
        "data.exclude": "/home/jörg/exclude.txt",
        "model.alpha": 1,
        "train.fine_tune_from": "conv_pw_6",
        "recipe": "best",
    }
    (point,) = grid_points({key: [value] for key, value in values.items()}, "g")
    compose(tmp_path / "params.yaml", *point.overrides)
    composed = yaml.safe_load((tmp_path / "params.yaml").read_text())
    assert composed["image"]["size"] == 160
    for key, value in values.items():
        if key != "recipe":
            group, name = key.split(".")
            assert composed[group][name] == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "- 1", "a: []", "a: {b: 1}", "a: [[1]]", "a: [1", "train:\n  epochs: [1]", "3"),
        "a: [1]\nb: 2\na: [3]",
    ],
)
def test_what_is_no_grid_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(UserError, match=r"grid\.yaml"):
        read_grid(tmp_path / "grid.yaml")


def test_what_dash_s_sets_is_left_to_dvc(tmp_path: Path) -> None:
    fixed = {
        "split.group_by": "'country: x'",
        "data.exclude": "2024-01-01",
        "train.batch_size": "8",
    }
    (point,) = grid_points({"train.seed": [7]}, "g", fixed)
    params = composed(tmp_path, *point.overrides)
    assert (params.split.group_by, params.data.exclude) == ("country: x", "2024-01-01")
    assert (params.train.batch_size, params.train.seed) == (8, 7)


def test_seeds_are_not_set_twice() -> None:
    with pytest.raises(UserError, match="--first"):
        _run(["seeds", "2", "-S", "train.seed=1"])


def test_an_experiment_interrupted_before_its_first_stage_does_not_run(tmp_path: Path) -> None:
    """DVC ends with a code instead of KeyboardInterrupt."""
    (tmp_path / ".dvc").mkdir()
    init_repository(tmp_path)
    ctrl_c = """
from dvc.commands.checkout import CmdCheckout
def run(self):
    raise KeyboardInterrupt
CmdCheckout.run = run
"""
    command = [sys.executable, "-c", ctrl_c + _RUN, "version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 252
    assert "DVC version" not in done.stdout


def test_a_new_recipe_that_git_does_not_track_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    init_repository(tmp_path)
    checked_git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "first")
    fill(tmp_path, dict.fromkeys(("conf/recipe/mine.yaml", "notes.txt"), b""))
    monkeypatch.setattr("facegender.runtime.sweep.run_points", lambda *_: (end for end in ()))
    connection.connect(tmp_path)
    for name, words in (("one", "track them: conf/recipe/mine.yaml. `git add`"), ("two", "")):
        run_sweep(tmp_path, {"recipe": ["mine"]}, name=name, jobs=1, environment={})
        out = capsys.readouterr().out
        assert words in out
        assert ("track them" in out) == bool(words)
        checked_git(tmp_path, "add", "conf")


def test_results_that_dvc_had_are_logged_as_those_of_a_run(tmp_path: Path) -> None:
    """In full: tests/pipeline/test_experiments.py, against a run that was executed."""
    init_repository(tmp_path)
    tables = ("history.csv", "robustness.csv", "test.json", "export.json")
    for name in ("dvc.yaml", "dvc.lock", *(f"metrics/{table}" for table in tables)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    compose(tmp_path / "params.yaml", "evaluate.threshold=0.6")
    commit = commit_all(tmp_path)
    # Edits since then do not matter.
    (tmp_path / "dvc.yaml").write_text("")
    connection.connect(tmp_path)
    run = mlflow.get_run(_log_restored(tmp_path, Point("point-1", {}), commit, {}))
    assert run.data.params["threshold"] == run.data.params["evaluate.threshold"] == "0.6"
    slope = json.loads((ROOT / "metrics/export.json").read_text())["calibration"]["slope"]
    assert run.data.metrics["calibration_slope"] == slope
    expected = {"loss", "kept_val_loss", "test_accuracy", "robustness_accuracy.blur", "export_n"}
    assert expected <= run.data.metrics.keys()
    assert input_tags((ROOT / "dvc.lock").read_text(), TRAINED_BY).items() <= run.data.tags.items()


def test_a_missing_grid_or_no_jobs_is_a_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="Cannot read the grid"):
        _run(["sweep", str(tmp_path / "none.yaml")])
    with pytest.raises(SystemExit):
        _run(["sweep", "--jobs", "0"])
    assert "argument --jobs: 0 is not a whole number of 1 or more" in capsys.readouterr().err


def test_the_spread_over_seeds_is_that_of_a_sample() -> None:
    found = spread_of([{"accuracy": 0.9, "ece": 0.1}, {"accuracy": 0.95, "ece": None}])
    assert found == {
        "accuracy": {
            "mean": pytest.approx(0.925),
            "sd": pytest.approx(0.05 / 2**0.5),
            "least": 0.9,
            "most": 0.95,
        }
    }
    assert math.isnan(spread_of([{"loss": 1.0}])["loss"]["sd"])


def test_an_experiment_that_cannot_be_fetched_fails_and_says_why(tmp_path: Path) -> None:
    root, workspace = tmp_path / "root", tmp_path / "point"
    clone = workspace / "clone"
    for folder, name in ((root, "one"), (clone, "other")):
        folder.mkdir(parents=True)
        init_repository(folder)
        commit_all(folder, name)
        checked_git(folder, "update-ref", "refs/exps/00/11/point", "HEAD")
    (workspace / "log").write_text("trained")
    head = checked_git(root, "rev-parse", "HEAD")
    ended = _end(Snapshot(root, head, head, root), Point("point", {}), workspace, 0, {}, ["false"])
    assert (ended.commit, ended.judged) == (None, None)
    assert ended.output.startswith("trained\nerror: git fetch failed: ")
    assert checked_git(root, "rev-parse", "refs/exps/00/11/point") == head


def test_a_clone_shares_the_cache_of_a_folder_with_umlauts(tmp_path: Path) -> None:
    from dvc.repo import Repo

    (tmp_path / "depth" / "Käse").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "depth" / "Käse")
    root = tmp_path / "link"
    init_repository(root)
    Repo.init(str(root)).close()
    commit_all(root)
    clone = root / ".dvc" / "tmp" / "sweep" / "clone"
    make_clone(take_snapshot(root), clone)
    with Repo(str(clone.resolve())) as repo:
        assert Path(repo.cache.local_cache_dir) == root.resolve() / ".dvc" / "cache"


@pytest.mark.parametrize(
    ("overrides", "differing"),
    [
        ((["recipe=quick"], ["recipe=paper"]), []),
        ((["recipe=quick"], ["recipe=best"]), ["train.label_smoothing"]),
        ((["split.seed=1"], ["split.seed=2"]), ["split"]),
        ((["image.face=crop"], ["image.face=none"]), []),
        (
            (
                ["data.checks.no_face=drop", "image.face=crop"],
                ["data.checks.no_face=drop", "image.face=crop", "image.crop.min_score=0.5"],
            ),
            ["image.crop"],
        ),
    ],
)
def test_losses_that_cannot_be_compared_have_no_best(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[list[str], list[str]],
    differing: list[str],
) -> None:
    init_repository(tmp_path)
    ends = []
    for number, words in enumerate(overrides):
        compose(tmp_path / "params.yaml", *words)
        ends.append(Ended(Point(f"point-{number}", {}), 0, "", commit_all(tmp_path), None))
    assert different_losses(tmp_path, [str(end.commit) for end in ends]) == differing
    marked = []
    sweep = "facegender.runtime.sweep"
    monkeypatch.setattr(f"{sweep}.experiments", lambda _: set())
    monkeypatch.setattr(f"{sweep}.run_points", lambda *_: (end for end in ends))
    monkeypatch.setattr(f"{sweep}._loss_in_mlflow", lambda *_: (0.1, "id"))
    monkeypatch.setattr(f"{sweep}.runs.sweep_run", lambda *_: nullcontext("parent"))
    monkeypatch.setattr(f"{sweep}.runs.mark_best", lambda *best: marked.append(best))
    assert run_sweep(tmp_path, {}, name="point", jobs=1, environment={}) == 0
    out = capsys.readouterr().out
    if differing:
        assert f"no best: the experiments differ in {', '.join(differing)}, so" in out
        assert not marked
    else:
        assert marked == [("id", "point-0", 0.1)]
        assert "best: point-0" in out


def test_no_verdict_says_why() -> None:
    report = Report("the work tree", None, [], undecided=["no main", "stale"])
    assert why_undecided(json.dumps(report.to_json(), indent=2)) == "no main; stale"
    assert why_undecided("INFO: x\nerror: no metrics\n") == "error: no metrics"
    assert why_undecided("") == "the gate printed nothing"


@pytest.mark.parametrize("name", ["a/b", "", "-x", "a..b", "a b", ".a", "a.", "a.lock/", "ä"])
def test_a_name_that_git_refuses_is_a_usage_error(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        _run(["sweep", f"--name={name}"])
    assert stop.value.code == 2
    assert "is not a name" in capsys.readouterr().err


def test_the_end_of_a_long_log_is_kept() -> None:
    kept = KeptOutput()
    for number in range(KEPT_CHARACTERS // 100 + 50):
        kept.add(f"{number:099}\n")
    assert len(kept.text()) == KEPT_CHARACTERS
    assert int(kept.text().splitlines()[-1]) == KEPT_CHARACTERS // 100 + 49
    kept.add("x" * 2 * KEPT_CHARACTERS + "the reason")
    assert len(kept.text()) == KEPT_CHARACTERS
    assert kept.text().endswith("x" + "the reason")
    kept.add("!")
    assert kept.text().endswith("the reason!")


def test_tags_tell_the_inputs_and_nothing_that_changes_by_itself(tmp_path: Path) -> None:
    stages = ["download", "train"]
    lock = {
        "stages": {
            "download": {
                "cmd": "fetch",
                "outs": [{"path": "raw", "md5": "1.dir"}, {"path": "raw.json", "md5": "2"}],
            },
            "train": {
                "cmd": "train",
                "deps": [{"path": "raw", "md5": "1.dir"}, {"path": "code.py", "md5": "3"}],
                "params": {"params.yaml": {"train": {"epochs": 2}}},
                "outs": [{"path": "run.json", "md5": "4"}],
            },
            "evaluate": {"cmd": "evaluate"},
        }
    }

    def tags() -> dict[str, str]:
        (tmp_path / "dvc.lock").write_text(yaml.safe_dump(lock))
        return input_tags(read_lock(tmp_path / "params.yaml"), stages)

    first = tags()
    assert first["dvc.data"] == "1.dir"
    entries = json.loads(json.dumps(lock["stages"]))
    lock["stages"]["train"]["outs"][0]["md5"] = "another run"
    lock["stages"]["evaluate"]["cmd"] = "another stage"
    assert tags() == first
    for change in (
        {"cmd": "train more"},
        {"deps": [{"path": "raw", "md5": "5.dir"}, {"path": "code.py", "md5": "3"}]},
        {"deps": [{"path": "raw", "md5": "1.dir"}, {"path": "code.py", "md5": "6"}]},
        {"params": {"params.yaml": {"train": {"epochs": 3}}}},
    ):
        lock["stages"]["train"] = entries["train"] | change
        assert tags()["dvc.lock"] != first["dvc.lock"]
    (tmp_path / "dvc.lock").unlink()
    assert input_tags(read_lock(tmp_path / "params.yaml"), stages) == {}
