"""Every way to run the pipeline logs to one store, which DVC and MLflow tell alike.

The sweep's experiments run in clones, started at the same time.
"""

import io
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import yaml
from mlflow.entities import Run

from facegender.params import Params, flatten
from facegender.runtime.dvc_context import TRAINED_BY, input_tags
from tests.conftest import logged_model
from tests.pipeline.conftest import EPOCHS, SMALL, Clone, copy_of, write_grid

pytestmark = pytest.mark.slow

TRAINED = ("sweep-1", "sweep-2")


def runs(clone: Clone) -> dict[str, Run]:
    """Return the runs in a clone's store by name; no name may occur twice."""
    every = clone.runs()
    named = {run.info.run_name: run for run in every}
    assert len(named) == len(every)
    return named


def shown(clone: Clone) -> dict[str, dict[str, Any]]:
    """Return what `dvc exp show` knows of each experiment, by its name."""
    (commit,) = json.loads(clone.run("dvc", "exp", "show", "--json").stdout)[1:]
    return {one["name"]: one["revs"][0]["data"] for one in commit["experiments"]}


def numbers(value: object, prefix: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        found: dict[str, float] = {}
        for key, child in value.items():
            found |= numbers(child, f"{prefix}.{key}" if prefix else key)
        return found
    return {prefix: float(value)} if isinstance(value, int | float) else {}


def test_the_store_has_every_run_once(swept: Clone) -> None:
    assert set(runs(swept)) == {"repro", "sweep", *(f"sweep-{number}" for number in range(1, 5))}
    assert [path.name for path in swept.root.rglob("mlflow.db")] == ["mlflow.db"]
    assert [path.name for path in swept.root.rglob("mlruns")] == ["mlruns"]
    assert list(swept.root.rglob("running.lock")) == []


@pytest.mark.parametrize("name", TRAINED)
def test_experiments_at_the_same_time_log_all_they_have(swept: Clone, name: str) -> None:
    run = runs(swept)[name]
    client = mlflow.MlflowClient()
    epochs = {"sweep-1": 3, "sweep-2": 4}[name]
    assert run.info.status == "FINISHED"
    assert run.data.params["train.epochs"] == str(epochs)
    assert run.data.params["train.seed"] == "42"
    text = swept.run("git", "show", f"{ref(swept, name)}:metrics/history.csv").stdout
    history = pd.read_csv(io.StringIO(text))
    for metric in ("loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"):
        logged = client.get_metric_history(run.info.run_id, metric)
        assert [point.step for point in logged] == list(range(1, epochs + 1))
        assert [point.value for point in logged] == pytest.approx(history[metric].tolist())
    folder = swept.root / "mlruns" / "facegender" / run.info.run_id / "artifacts"
    assert run.info.artifact_uri == folder.as_uri()
    for path in ("metrics/test.json", "metrics/test/roc.png", "export/model.tflite"):
        assert (folder / path).is_file()
    location = logged_model(run.info.run_id).artifact_location
    assert location.startswith((swept.root / "mlruns").as_uri())


def ref(clone: Clone, name: str) -> str:
    """Return the commit of an experiment."""
    lines = clone.run("git", "for-each-ref", "--format", "%(objectname) %(refname)").stdout
    (commit,) = [line.split()[0] for line in lines.splitlines() if line.endswith(f"/{name}")]
    return commit


@pytest.mark.parametrize("name", TRAINED)
def test_tags_tie_a_run_to_commit_experiment_and_inputs(swept: Clone, name: str) -> None:
    tags = runs(swept)[name].data.tags
    head = swept.run("git", "rev-parse", "HEAD").stdout.strip()
    assert tags["mlflow.source.git.commit"] == head
    assert tags["dvc.exp_baseline_rev"] == head
    assert tags["dvc.exp_name"] == name
    lock = swept.run("git", "show", f"{ref(swept, name)}:dvc.lock").stdout
    expected = input_tags(lock, TRAINED_BY)
    assert set(expected) == {"dvc.data", "dvc.lock"}
    assert {key: tags[key] for key in expected} == expected
    assert tags["dvc.data"] in lock
    others = {runs(swept)[other].data.tags["dvc.lock"] for other in TRAINED}
    assert len(others) == len(TRAINED)


def test_a_sweep_nests_its_runs_and_marks_the_best_by_validation_loss(swept: Clone) -> None:
    every = runs(swept)
    parent = every["sweep"]
    assert parent.info.status == "FINISHED"
    assert parent.data.params["train.epochs"] == f"3, 4, {EPOCHS}, -1"
    children = {name: run for name, run in every.items() if name.startswith("sweep-")}
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {
        parent.info.run_id
    }
    client = mlflow.MlflowClient()

    def kept(run: Run) -> float:
        by_epoch = client.get_metric_history(run.info.run_id, "val_loss")
        (loss,) = (p.value for p in by_epoch if p.step == run.data.metrics["kept_epoch"])
        return loss

    losses = {name: kept(run) for name, run in children.items() if run.info.status == "FINISHED"}
    assert set(losses) == {*TRAINED, "sweep-3"}
    best = min(losses, key=lambda name: losses[name])
    marked = [name for name, run in children.items() if "facegender.best" in run.data.tags]
    assert marked == [best]
    assert parent.data.tags["facegender.best"] == best
    assert parent.data.metrics["best_val_loss"] == pytest.approx(losses[best])


def test_results_that_dvc_had_are_logged_without_training(swept: Clone) -> None:
    restored = runs(swept)["sweep-3"]
    assert restored.data.tags["dvc.restored"] == "true"
    repro = runs(swept)["repro"]
    for tag in ("dvc.data", "dvc.lock"):
        assert restored.data.tags[tag] == repro.data.tags[tag]
    assert restored.data.params == repro.data.params
    assert restored.data.params["train.epochs"] == str(EPOCHS)
    assert restored.data.metrics == repro.data.metrics


def test_a_failed_experiment_stops_nothing_and_leaves_its_log(swept: Clone) -> None:
    failed = runs(swept)["sweep-4"]
    assert failed.info.status == "FAILED"
    log = mlflow.artifacts.load_text(f"{failed.info.artifact_uri}/log/train.txt")
    assert "train.epochs" in log
    printed = (swept.root.parent / "printed").read_text()
    assert "sweep-4  train.epochs=-1  FAILED: " in printed
    assert printed.count("validation loss 0.") == 3
    assert "locked" not in printed
    assert list((swept.root / ".dvc/tmp").glob("sweep-*")) == []


def test_dvc_and_mlflow_tell_the_same_numbers(swept: Clone) -> None:
    every, experiments = runs(swept), shown(swept)
    assert set(experiments) == {*TRAINED, "sweep-3"}
    for name, data in experiments.items():
        run = every[name]
        for part in ("test", "export"):
            told = numbers(data["metrics"][f"metrics/{part}.json"]["data"])
            assert len(told) > 3
            for metric, value in told.items():
                assert run.data.metrics[f"{part}_{metric}"] == value
        params = flatten(Params.model_validate(data["params"]["params.yaml"]["data"]))
        told = {key: str(value) for key, value in params.items()}
        assert len(told) > 50
        assert told.items() <= run.data.params.items()


def test_seeds_show_how_far_chance_moves_the_results(reproduced: Clone, tmp_path: Path) -> None:
    clone = copy_of(reproduced, tmp_path)
    # The first seed is the pipeline's own, whose results DVC has: one training.
    words = [word for item in SMALL for word in ("-S", item)]
    printed = clone.run("facegender", "seeds", "2", "--name", "seeds", "--jobs", "2", *words).stdout
    every = runs(clone)
    parent = every["seeds"]
    accuracies = [every[f"seeds-{n}"].data.metrics["test_accuracy"] for n in (1, 2)]
    assert [every[f"seeds-{n}"].data.params["train.seed"] for n in (1, 2)] == ["42", "43"]
    assert every["seeds-1"].data.tags["mlflow.parentRunId"] == parent.info.run_id
    found = parent.data.metrics
    assert found["test_accuracy_mean"] == pytest.approx(sum(accuracies) / 2)
    assert found["test_accuracy_sd"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert sum(value for key, value in found.items() if key.startswith("gate_")) == 2
    assert "2 seeds, test split of" in printed
    assert "not the parameters of params.yaml" not in printed
    assert "no verdict" not in printed


@pytest.mark.campaign  # in short: test_store.py, where a stage is stopped
def test_a_sweep_that_is_stopped_stops_its_experiments(reproduced: Clone, tmp_path: Path) -> None:
    clone = copy_of(reproduced, tmp_path)
    write_grid(tmp_path / "grid.yaml", [100_000])
    process = subprocess.Popen(
        # As a background job of a script, which ignores Ctrl-C.
        ["sh", "-c", "trap '' INT; exec facegender sweep ../grid.yaml --name stopped"],
        cwd=clone.root,
        env=clone.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while "val_loss" not in metrics(clone, "stopped-1"):
            assert process.poll() is None, process.communicate()
            time.sleep(1)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, output
    every = runs(clone)
    assert [every[name].info.status for name in ("stopped", "stopped-1")] == ["FAILED"] * 2
    assert list((clone.root / ".dvc/tmp").glob("sweep-*")) == []


def metrics(clone: Clone, name: str) -> dict[str, float]:
    run = runs(clone).get(name)
    return run.data.metrics if run else {}


@pytest.mark.campaign  # in short: the sweep, whose experiments are temporary, too
def test_a_queued_experiment_logs_to_the_same_store(reproduced: Clone, tmp_path: Path) -> None:
    clone = copy_of(reproduced, tmp_path)
    words = [word for item in (*SMALL, "train.epochs=1") for word in ("-S", item)]
    clone.run("dvc", "exp", "run", "--queue", "--name", "queued", *words)
    # The worker goes on by itself, but would hold on to this process's pipes.
    clone.run("sh", "-c", "dvc queue start >/dev/null 2>&1")
    end = time.monotonic() + 900
    while "queued" not in shown_finished(clone):
        assert time.monotonic() < end, clone.run("dvc", "queue", "status").stdout
        time.sleep(2)
    queued = runs(clone)["queued"]
    assert queued.info.status == "FINISHED"
    assert queued.data.tags["dvc.exp_name"] == "queued"
    assert "test_accuracy" in queued.data.metrics


def test_evaluating_again_by_hand_logs_to_the_same_run(reproduced: Clone, tmp_path: Path) -> None:
    clone = copy_of(reproduced, tmp_path)
    before = runs(clone)["repro"].info.end_time
    folder = clone.root / "docs"
    lock = yaml.safe_load((clone.root / "dvc.lock").read_text())
    _, _, _, *options = lock["stages"]["evaluate"]["cmd"].split()
    words = (word if word.startswith("--") else f"../{word}" for word in options)
    stage = ("python", "../stages/evaluate.py", "--params", "../params.yaml")
    assert "which trained the model" in Clone(folder).run(*stage, *words).stdout
    (run,) = runs(clone).values()
    assert run.info.end_time > before
    assert list(folder.glob("ml*")) == []
    # The model is not logged twice.
    (_,) = mlflow.search_logged_models([run.info.experiment_id], output_format="list")


def shown_finished(clone: Clone) -> str:
    lines = clone.run("dvc", "queue", "status").stdout.splitlines()
    assert not any("Failed" in line for line in lines), lines
    return "\n".join(line for line in lines if "Success" in line)
