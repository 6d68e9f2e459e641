import getpass
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mlflow
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from facegender.runtime import entry_points
from facegender.tracking import connection, log, runs
from tests.conftest import free_port


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield
    mlflow.end_run()


@pytest.fixture
def nobody() -> str:
    """The address of a server that is down, with a password that nothing may print."""
    return f"http://me:canary@127.0.0.1:{free_port()}"


def run(name: str = "test", resume: str | None = None, **given: Any):
    inputs = {"params": {}, "tags": {}, "manifests": {}} | given
    return runs.training_run(name=name, resume=resume, **inputs)


def evaluate(run_id: str, history: dict, **inputs: Any):
    """Open the run of an evaluation, which logs what it lacks."""
    given = {"params": {}, "manifests": {}, "tags": {}, "inputs": {}, "model": Path("absent")}
    frame = pd.DataFrame(history)
    return runs.evaluation_run(run_id, evaluation="e", name="test", history=frame, **given | inputs)


def failing(words: str) -> Mock:
    return Mock(side_effect=MlflowException(words))


def points(run_id: str) -> list[tuple[int, float]]:
    history = mlflow.MlflowClient().get_metric_history(run_id, "loss")
    return sorted((point.step, point.value) for point in history)


def test_a_server_that_is_down_is_replaced_by_the_local_store(
    tmp_path: Path, nobody: str, caplog: pytest.LogCaptureFixture
) -> None:
    connection.connect(tmp_path, nobody)
    with run() as opened:
        log.log_epoch(1, {"loss": 0.5})
    assert points(opened.info.run_id) == [(1, 0.5)]
    assert (tmp_path / "mlflow.db").is_file()
    assert "does not answer" in caplog.text
    assert "dvc repro --force --single-item evaluate report" in caplog.text
    assert "canary" not in caplog.text


def test_a_server_that_fails_later_costs_the_log_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    connection.connect(tmp_path)
    fail = failing("no answer from http://me:canary@host")
    with run() as opened:
        log.log_epoch(1, {"loss": 0.5})
        with monkeypatch.context() as patch:
            patch.setattr(mlflow, "log_metrics", fail)
            patch.setattr(mlflow, "get_tracking_uri", lambda: "http://host")
            log.log_epoch(2, {"loss": 0.4})
            log.log_epoch(3, {"loss": 0.3})
            log.log_results(
                {"accuracy": 1.0},
                robustness=pd.DataFrame({"change": ["blur"], "accuracy": [0.5]}),
                export={"calibration": {"slope": 1.0}},
                history=pd.DataFrame({"epoch": [3], "val_loss": [0.3], "kept": [1]}),
            )
        log.log_files(tmp_path / "mlflow.db", metrics=[])  # would open another run
    fail.assert_called_once()
    assert len(mlflow.search_runs(experiment_names=["facegender"])) == 1
    assert "the rest of this stage is not logged" in caplog.text
    assert "canary" not in caplog.text
    history = {"epoch": [1, 2, 3], "loss": [0.5, 0.4, 0.3]}
    with evaluate(opened.info.run_id, history) as (same, _):
        assert same.info.run_id == opened.info.run_id
    assert points(opened.info.run_id) == [(1, 0.5), (2, 0.4), (3, 0.3)]


def test_parameters_and_datasets_that_an_outage_lost_are_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.connect(tmp_path)
    manifests = {"train": tmp_path / "train.csv", "validation": tmp_path / "validation.csv"}
    for path in manifests.values():
        path.write_text("path,label,sha256\na.png,0,1\n")
    settings = {"train.keep": "best", "train.seed": 42}
    with monkeypatch.context() as patch:
        for name in ("log_input", "log_params"):
            patch.setattr(mlflow, name, failing("no answer"))
        patch.setattr(mlflow, "get_tracking_uri", lambda: "http://host")
        with runs.training_run(
            name="test", params=settings, tags={}, manifests=manifests
        ) as opened:
            pass
    run_id = opened.info.run_id
    mlflow.MlflowClient().log_metric(run_id, "val_loss", 0.5)
    assert runs.validation_loss(run_id) is None  # a sweep that meets it goes on
    mlflow.MlflowClient().log_metric(run_id, "kept_val_loss", 0.5)
    with evaluate(run_id, {"epoch": []}, params=settings, manifests=manifests):
        pass
    sent = mlflow.get_run(run_id)
    assert sent.data.params == {"train.keep": "best", "train.seed": "42"}
    assert sorted(item.dataset.name for item in sent.inputs.dataset_inputs) == [*manifests]
    assert runs.validation_loss(run_id) == 0.5


@pytest.mark.parametrize("written", ["sqlite:///other.db", "sqlite:///mlflow.db", "folder/runs"])
def test_a_relative_address_starts_at_the_repository_wherever_a_stage_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    root, experiment = tmp_path / "root", tmp_path / "root/.dvc/tmp/experiment"
    experiment.mkdir(parents=True)
    monkeypatch.chdir(experiment)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    connection.connect(root, written)
    path = written.removeprefix("sqlite:///")
    assert mlflow.get_tracking_uri().removeprefix("sqlite:///") == str(root / path)
    assert (root / path).exists()
    with run() as opened:
        mlflow.log_text("kept", "note.txt")
    assert str(root) in opened.info.artifact_uri
    assert str(experiment) not in opened.info.artifact_uri
    assert list(experiment.iterdir()) == []


def test_a_local_store_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.connect(tmp_path)
    monkeypatch.setattr(mlflow, "log_metrics", failing("database or disk is full"))
    with run(), pytest.raises(MlflowException):
        log.log_epoch(1, {"loss": 0.5})


def test_another_machine_may_make_the_experiment_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.connect(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "get_experiment_by_name", lambda _: None)
        connection.connect(tmp_path)
    with run() as opened:
        assert (
            opened.info.experiment_id == mlflow.get_experiment_by_name("facegender").experiment_id
        )


def test_an_interrupted_run_is_taken_up_with_each_epoch_once(tmp_path: Path) -> None:
    connection.connect(tmp_path)
    ids: list[str] = []

    def interrupted() -> None:
        with run() as begun:
            ids.append(begun.info.run_id)
            log.log_epoch(1, {"loss": 0.5}, 1_000)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert mlflow.get_run(ids[0]).info.status == "FAILED"
    with run(name="again", resume=ids[0]) as same:
        log.log_epoch(1, {"loss": 0.5}, 1_000)
        log.log_epoch(2, {"loss": 0.4}, 2_000)
    assert same.info.run_id == ids[0]
    assert points(ids[0]) == [(1, 0.5), (2, 0.4)]
    ended = mlflow.get_run(ids[0])
    assert (ended.info.status, ended.info.run_name) == ("FINISHED", "again")
    with run(resume="0" * 32) as other:
        assert other.info.run_id != ids[0]


def test_a_run_never_holds_parameters_that_were_changed_after_it_began(tmp_path: Path) -> None:
    connection.connect(tmp_path)
    before = {"evaluate.threshold": 0.5, "split.classes.male": "m" * 7000, "model.alpha": 0.25}
    after = before | {"evaluate.threshold": 0.6}
    with run(params=before) as begun:
        pass
    with run(params=before | {"model.dropout": 0.1}, resume=begun.info.run_id) as same:
        assert same.info.run_id == begun.info.run_id
    with run(params=after, resume=begun.info.run_id) as resumed:
        assert resumed.info.run_id != begun.info.run_id
    assert mlflow.get_run(resumed.info.run_id).data.params["evaluate.threshold"] == "0.6"

    history, model = {"epoch": []}, tmp_path / "model"
    model.touch()
    with evaluate(begun.info.run_id, history, params=after, model=model) as (own, which):
        assert which.endswith("holds other parameters")
    assert mlflow.get_run(own.info.run_id).data.params["evaluate.threshold"] == "0.6"
    with evaluate(begun.info.run_id, history, params=after, model=model) as (again, _):
        assert again.info.run_id == own.info.run_id
    third = before | {"evaluate.threshold": 0.7}
    with evaluate(begun.info.run_id, history, params=third, model=model) as (other, _):
        assert other.info.run_id not in {own.info.run_id, begun.info.run_id}
    with evaluate(begun.info.run_id, history, params=before) as (trained, _):
        assert trained.info.run_id == begun.info.run_id


def test_an_evaluation_of_another_clones_model_is_completed_after_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.connect(tmp_path)
    settings, history, model = {"train.seed": 42}, {"epoch": [1], "loss": [0.5]}, tmp_path / "model"
    model.touch()
    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "log_params", failing("no answer"))
        patch.setattr(mlflow, "get_tracking_uri", lambda: "http://host")
        with evaluate("0" * 32, history, params=settings, model=model) as (lost, _):
            pass
    assert points(lost.info.run_id) == []
    with evaluate("0" * 32, history, params=settings, model=model) as (again, _):
        assert again.info.run_id == lost.info.run_id
    assert points(lost.info.run_id) == [(1, 0.5)]
    assert mlflow.get_run(lost.info.run_id).data.params == {"train.seed": "42"}


def test_a_resumed_run_names_the_commit_versions_and_experiment_that_ended_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.connect(tmp_path)
    with run(tags={"dvc.exp_name": "sweep-1", "mlflow.parentRunId": "0" * 32}) as begun:
        pass
    monkeypatch.setattr(runs, "package_versions", lambda: {"keras": "99"})
    context = {"mlflow.source.git.commit": "c", "mlflow.user": "login"}
    monkeypatch.setattr(runs, "resolve_tags", lambda tags: context | tags)
    with run(tags={"dvc.exp_name": "other"}, resume=begun.info.run_id) as resumed:
        pass
    tags = mlflow.get_run(resumed.info.run_id).data.tags
    assert (tags["mlflow.source.git.commit"], tags["version.keras"]) == ("c", "99")
    assert (tags["dvc.exp_name"], tags["mlflow.user"]) == ("other", getpass.getuser())
    assert "mlflow.parentRunId" not in tags


def test_a_store_that_is_locked_does_not_hide_what_went_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    connection.connect(tmp_path)
    ids: list[str] = []

    def interrupted_while_writing(other: sqlite3.Connection) -> None:
        with run() as opened:
            ids.append(opened.info.run_id)
            other.execute("BEGIN EXCLUSIVE")
            raise KeyboardInterrupt

    with (
        closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other,
        pytest.raises(KeyboardInterrupt),
    ):
        interrupted_while_writing(other)
    assert "still lists this run as running" in caplog.text
    connection.connect(tmp_path)
    assert mlflow.get_run(ids[0]).info.status == "KILLED"


def test_a_failure_that_cannot_be_logged_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object) -> None:
        raise MlflowException("database or disk is full\n[SQL: \nCREATE TABLE experiments (\n)]")

    monkeypatch.setattr(connection, "connect", full)
    entry_points._keep_failure("")
    assert caplog.messages == ["MLflow has no log of this failure: database or disk is full"]


def test_a_run_that_was_interrupted_as_it_opened_is_not_running_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.connect(tmp_path)
    ids: list[str] = []

    def interrupted(run_id: str, **_: object) -> None:
        ids.append(run_id)
        raise KeyboardInterrupt

    monkeypatch.setattr(mlflow, "start_run", interrupted)
    with pytest.raises(KeyboardInterrupt), run():
        pass
    connection.connect(tmp_path)
    assert mlflow.get_run(ids[0]).info.status == "KILLED"


def test_metadata_of_a_logged_dataset_stays_text(tmp_path: Path) -> None:
    manifest = tmp_path / "train.csv"
    manifest.write_text("path,label,sha256,id,country\na.png,0,x,007,NA\nb.png,1,y,,nan\n")
    connection.connect(tmp_path)
    with runs.training_run(name="n", params={}, tags={}, manifests={"train": manifest}) as run:
        pass
    dataset = mlflow.get_run(run.info.run_id).inputs.dataset_inputs[0].dataset
    columns = json.loads(dataset.schema)["mlflow_colspec"]
    assert {column["name"]: column["type"] for column in columns} == dict.fromkeys(
        ("path", "label", "sha256", "id", "country"), "string"
    )
