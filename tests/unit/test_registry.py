"""Promotion, in a real store of MLflow's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import parse_qs, urlsplit

import mlflow
import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException

from facegender.cli.main import _run
from facegender.data.images import encode_png
from facegender.errors import UserError
from facegender.files import file_sha256
from facegender.params import MaxDrop
from facegender.tracking import log, mlflow_pages, registry, runs
from facegender.tracking.registry import Promotion, Verdict, find_run
from tests.conftest import Exported, fill, logged_model
from tests.unit.conftest import (
    Store,
    cached_object,
    commit_params,
    edit_params,
    log_run,
    store_splits,
)
from tools.compose_params import ROOT


def passes(candidate: Path, champion: Path | None) -> Verdict:
    return Verdict(True, "fit")


def fails(candidate: Path, champion: Path | None) -> Verdict:
    return Verdict(False, "unfit")


def promote(
    store: Store, name: str, judge: registry.Judge = passes, reason: str | None = None
) -> Promotion:
    run = mlflow.get_run(store.runs[name])
    return registry.promote(run, judge, lock=store.root / "lock", force_reason=reason)


def rollback(store: Store) -> tuple[int, int]:
    return registry.rollback(lock=store.root / "lock")


def aliases() -> dict[str, int]:
    model = MlflowClient().get_registered_model("facegender")
    return {alias: int(number) for alias, number in model.aliases.items()}


def version(number: int) -> mlflow.entities.model_registry.ModelVersion:
    return MlflowClient().get_model_version("facegender", str(number))


def test_a_run_that_passes_is_the_champion_with_its_report(store: Store) -> None:
    assert promote(store, "good") == Promotion(1, None, Verdict(True, "fit"), champion=True)
    assert aliases() == {"champion": 1}
    assert version(1).description == "fit"
    assert version(1).tags["gate"] == "passed"
    assert version(1).run_id == store.runs["good"]
    model = mlflow.pyfunc.load_model("models:/facegender@champion")
    assert model.metadata.run_id == store.runs["good"]


def test_the_test_metrics_are_linked_to_the_logged_model(store: Store) -> None:
    run = mlflow.get_run(store.runs["good"])
    metrics = logged_model(run.info.run_id).metrics
    linked = {metric.key: metric.value for metric in metrics}
    assert linked == {key: run.data.metrics[key] for key in linked}
    assert {"test_accuracy", "test_f1", "test_ece"} <= set(linked)


def test_pages_show_the_metrics_and_compare_the_last_runs(store: Store) -> None:
    experiment = mlflow.get_run(store.runs["good"]).info.experiment_id
    mlflow_pages.share_view()
    page = urlsplit(urlsplit(mlflow_pages.runs_page("http://host", shared=True)).fragment)
    assert page.path == f"/experiments/{experiment}/runs"
    view = mlflow.get_experiment(experiment).tags[
        f"mlflow.sharedViewState.{parse_qs(page.query)['viewStateShareKey'][0]}"
    ]
    assert "metrics.`test_accuracy`" in json.loads(view)["selectedColumns"]
    address = mlflow_pages.compare_page("http://host")
    assert address is not None
    query = parse_qs(urlsplit(urlsplit(address).fragment).query)
    assert json.loads(query["experiments"][0]) == [experiment]
    last, *others = json.loads(query["runs"][0])
    assert 1 <= len(others) <= 2
    for run_id in {*store.runs.values()} - {last}:
        MlflowClient().delete_run(run_id)
    assert mlflow_pages.compare_page("http://host") is None


def test_the_gate_gets_the_results_of_both(store: Store) -> None:
    seen = []

    def look(candidate: Path, champion: Path | None) -> Verdict:
        folders = [folder for folder in (candidate, champion) if folder]
        accuracies = [
            json.loads((folder / "test.json").read_text())["accuracy"] for folder in folders
        ]
        seen.append(accuracies)
        assert all(len(pd.read_csv(folder / "predictions.csv")) == 40 for folder in folders)
        return Verdict(True, "")

    promote(store, "good", look)
    promote(store, "better", look)
    assert seen == [[0.95], [1.0, 0.95]]


def test_a_run_is_registered_once(store: Store) -> None:
    promote(store, "good", fails)
    assert promote(store, "good", passes).version == 1
    again = promote(store, "good", fails)
    assert again == Promotion(1, 1, None, champion=True)
    assert [item.version for item in registry.list_versions()] == [1]
    assert aliases() == {"champion": 1}
    assert version(1).description == "fit"


def test_a_run_that_fails_stays_challenger(store: Store) -> None:
    promote(store, "good")
    done = promote(store, "worse", fails)
    assert done == Promotion(2, 1, Verdict(False, "unfit"), champion=False)
    assert aliases() == {"champion": 1, "challenger": 2}
    assert version(2).description == "unfit"
    assert version(2).tags["gate"] == "failed"


def test_force_is_recorded_until_the_run_passes(store: Store) -> None:
    promote(store, "good")
    assert promote(store, "worse", fails, "the fair is tomorrow").champion
    assert aliases() == {"champion": 2}
    assert version(2).tags["forced_reason"] == "the fair is tomorrow"
    assert version(2).description == "**Promoted by force.** the fair is tomorrow\n\nunfit"
    promote(store, "better", passes, "not needed")
    assert "forced_reason" not in version(3).tags
    promote(store, "worse", passes)
    assert "forced_reason" not in version(2).tags
    assert version(2).description == "fit"


def test_rollback_goes_back_one_champion_at_a_time(store: Store) -> None:
    for name in ("good", "worse", "better"):
        promote(store, name)
    assert rollback(store) == (3, 2)
    assert aliases() == {"champion": 2}
    assert rollback(store) == (2, 1)
    with pytest.raises(UserError, match="Version 1 is the champion, and no earlier one"):
        rollback(store)
    assert aliases() == {"champion": 1}
    # And forward again.
    assert promote(store, "better") == Promotion(3, 1, Verdict(True, "fit"), champion=True)
    assert rollback(store) == (3, 1)


def test_rollback_passes_over_deleted_versions(store: Store) -> None:
    for name in ("good", "worse", "better"):
        promote(store, name)
    MlflowClient().delete_model_version("facegender", "2")
    assert rollback(store) == (3, 1)


def test_rollback_refuses_a_version_whose_model_is_lost(store: Store) -> None:
    for name in ("good", "worse", "better"):
        promote(store, name)
    for run in ("worse", "better"):
        shutil.rmtree(Path(logged_model(store.runs[run]).artifact_location.removeprefix("file://")))
    with pytest.raises(UserError, match=r"^The model of version 2, .* version 3 stays .* delete"):
        rollback(store)
    assert aliases() == {"champion": 3}
    MlflowClient().delete_model_version("facegender", "2")
    assert rollback(store) == (3, 1)


def test_rollback_does_not_wait_for_a_storage_that_fails(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("good", "better"):
        promote(store, name)
    storage = Mock(side_effect=ConnectionError("Could not connect to the endpoint"))
    monkeypatch.setattr(mlflow.artifacts, "list_artifacts", storage)
    assert rollback(store) == (2, 1)
    assert "files of models:/facegender/1 cannot be listed: ConnectionError" in caplog.text


def test_there_is_nothing_to_roll_back_at_first(store: Store) -> None:
    with pytest.raises(UserError, match="no champion to roll back"):
        rollback(store)
    assert registry.list_versions() == []


@pytest.mark.parametrize(
    "write",
    [
        "create_registered_model",
        "create_model_version",
        "set_registered_model_alias",
        "log_text",
        "update_model_version",
        "set_model_version_tag",
        "set_registered_model_tag",
    ],
)
def test_a_promotion_that_breaks_off_leaves_the_champion(
    store: Store, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    promote(store, "good")
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, write, Mock(side_effect=MlflowException("the disk is full")))
        with pytest.raises(MlflowException, match="the disk is full"):
            promote(store, "better")
    assert aliases()["champion"] == 1
    with pytest.raises(UserError, match="no earlier one"):
        rollback(store)
    assert promote(store, "better").version == 2
    assert aliases() == {"champion": 2}
    assert rollback(store) == (2, 1)


def test_a_gate_that_breaks_off_leaves_the_champion(store: Store) -> None:
    promote(store, "good")
    with pytest.raises(UserError, match="no power"):
        promote(store, "better", Mock(side_effect=UserError("no power")))
    assert aliases()["champion"] == 1


def test_a_champion_that_changes_meanwhile_is_left(store: Store) -> None:
    promote(store, "good")
    promote(store, "worse", fails)

    def slow(candidate: Path, champion: Path | None) -> Verdict:
        MlflowClient().set_registered_model_alias("facegender", "champion", "2")
        return Verdict(True, "fit")

    with pytest.raises(UserError, match="Somebody else changed the champion"):
        promote(store, "better", slow)
    assert aliases()["champion"] == 2


def test_a_champion_without_its_results_needs_force(
    store: Store, another_run: Callable[[str], str]
) -> None:
    doomed = mlflow.get_run(another_run("doomed"))
    registry.promote(doomed, passes, lock=store.root / "lock")
    shutil.rmtree(Path(urlsplit(doomed.info.artifact_uri).path) / "metrics")
    done = promote(store, "better")
    assert not done.champion
    assert done.verdict is not None
    assert "Version 1, the champion, cannot be judged" in done.verdict.report
    assert promote(store, "better", reason="its results are lost").champion


def test_a_long_report_is_cut_and_kept_whole(store: Store) -> None:
    report = "flipped: face\n" * 1000
    promote(store, "good", lambda candidate, champion: Verdict(True, report))
    description = version(1).description or ""
    assert len(description) == 5000
    assert "`gate.md` of the run" in description
    assert mlflow.artifacts.load_text(f"runs:/{store.runs['good']}/gate.md") == report


def test_a_run_is_found_by_id_beginning_or_name(store: Store) -> None:
    run_id = store.runs["good"]
    for wanted in (run_id, run_id[:12], "good"):
        assert find_run(wanted).info.run_id == run_id


def test_what_is_ambiguous_is_listed(store: Store, another_run: Callable[[str], str]) -> None:
    second = another_run("good")
    with pytest.raises(UserError, match="'good' is ambiguous, 2 runs") as error:
        find_run("good")
    for run_id in (second, store.runs["good"]):
        assert f"{run_id[:12]} (good, 20" in str(error.value)
    assert "test accuracy 0.9500" in str(error.value)
    assert find_run(second).info.run_id == second


@pytest.mark.parametrize("wanted", ["best", "", "' or 1=1"])
def test_an_unknown_run_names_those_there_are(store: Store, wanted: str) -> None:
    with pytest.raises(UserError, match="no run with the id or name") as error:
        find_run(wanted)
    assert all(run_id[:12] in str(error.value) for run_id in store.runs.values())


def test_an_empty_store_says_how_results_get_a_run(store: Store) -> None:
    """`dvc repro` runs nothing if the results are there and only the store was lost."""
    for run_id in store.runs.values():
        MlflowClient().delete_run(run_id)
    with pytest.raises(UserError, match="`dvc repro --force --single-item evaluate`"):
        find_run("repro")


def test_a_run_without_results_or_model_registers_nothing(store: Store, tmp_path: Path) -> None:
    with mlflow.start_run(run_name="broken off") as run:
        pass
    with pytest.raises(UserError, match="results"):
        registry.promote(find_run("broken off"), passes, lock=tmp_path / "lock")
    (tmp_path / "test.json").write_text("{}")
    MlflowClient().log_artifact(run.info.run_id, str(tmp_path / "test.json"), "metrics")
    with pytest.raises(UserError, match=r"broken off.*has logged no model"):
        registry.promote(find_run("broken off"), passes, lock=tmp_path / "lock")
    assert registry.list_versions() == []


def test_of_results_that_dvc_had_the_run_that_trained_is_promoted(store: Store) -> None:
    tags = {"dvc.lock": "digest", "dvc.restored": "true"}
    with mlflow.start_run(run_name="sweep-3", tags=tags):
        pass
    with pytest.raises(UserError, match="`dvc exp apply sweep-3`, then `dvc repro --force"):
        registry.promote(find_run("sweep-3"), passes, lock=store.root / "lock")
    MlflowClient().set_tag(store.runs["good"], "dvc.lock", "digest")
    with pytest.raises(UserError, match=r"run that trained it: \w{12} \(good, [^;]*\)\.$"):
        registry.promote(find_run("sweep-3"), passes, lock=store.root / "lock")
    assert registry.list_versions() == []


@pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED"])
def test_a_run_that_did_not_finish_is_refused(store: Store, status: str) -> None:
    MlflowClient().update_run(store.runs["good"], status)
    with pytest.raises(UserError, match=rf"good.* is {status}") as refused:
        promote(store, "good")
    assert ("Wait" in str(refused.value)) == (status == "RUNNING")
    assert registry.list_versions() == []


def test_a_model_whose_logging_broke_off_is_refused(store: Store) -> None:
    model_id = logged_model(store.runs["good"]).model_id
    MlflowClient().finalize_logged_model(model_id, LoggedModelStatus.FAILED)
    with pytest.raises(UserError, match="has logged no model"):
        promote(store, "good")
    assert registry.list_versions() == []


def test_a_lost_model_is_not_promoted_but_logged_again(store: Store, exported: Exported) -> None:
    run = store.runs["good"]
    lost = logged_model(run)
    shutil.rmtree(lost.artifact_location.removeprefix("file://"))
    with pytest.raises(UserError, match=r"good.* is lost\..* logs it again"):
        promote(store, "good")
    assert registry.list_versions() == []
    for _ in range(2):  # once more changes nothing
        with runs.training_run(name="good", params={}, tags={}, manifests={}, resume=run):
            again = log.log_model(
                exported.float32,
                code=ROOT / "facegender",
                threshold=0.5,
                input_example=pd.DataFrame({"image": [encode_png(exported.images[0])]}),
            )
        assert promote(store, "good").version == 1
        assert version(1).source == f"models:/{again}" != f"models:/{lost.model_id}"


def test_the_commands(store: Store, capsys: pytest.CaptureFixture) -> None:
    assert _run(["models"]) == 0
    assert "no model is registered" in capsys.readouterr().err
    assert _run(["promote", "good"]) == 0
    assert f"(run {store.runs['good'][:12]}, good) passes" in capsys.readouterr().out
    assert _run(["promote", "good"]) == 0
    assert "is the champion already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"version 1 stays the champion.*--force --reason"):
        _run(["promote", "worse"])
    assert "Gate: fail" in capsys.readouterr().out
    assert _run(["promote", "worse", "--force", "--reason", "a trial"]) == 0
    assert "by force is the champion now, after version 1" in capsys.readouterr().out
    assert _run(["models", "--json"]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(item["version"], item["aliases"], item["gate"]) for item in listed] == [
        (2, ["champion"], "failed"),
        (1, [], "passed"),
    ]
    assert listed[0]["forced_reason"] == "a trial"
    assert listed[0]["test_accuracy"] == 0.7
    assert _run(["rollback"]) == 0
    assert "version 1 is the champion again, version 2 no longer" in capsys.readouterr().out
    assert _run(["models"]) == 0
    assert "champion    gate: passed  test accuracy 0.9500" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--force"], ["--reason", "because"], ["--force", "--reason", " "]]
)
def test_force_and_a_reason_need_each_other(
    store: Store, capsys: pytest.CaptureFixture, words: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        _run(["promote", "good", *words])
    assert stop.value.code == 2
    assert "reason" in capsys.readouterr().err
    assert registry.list_versions() == []


def test_a_server_that_does_not_answer_is_one_paragraph_without_the_password(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"not answer \(ConnectionError\)\. Start") as error:
        _run(["promote", "good"])
    assert "secret" not in str(error.value)


def test_an_error_of_the_database_is_one_line(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = MlflowException("database is locked\n[SQL: UPDATE registered_models SET ...]")
    monkeypatch.setattr(registry, "list_versions", Mock(side_effect=locked))
    with pytest.raises(UserError, match=r"request: database is locked\. `facegender models`"):
        _run(["models"])


def test_the_gate_judges_beside_the_champion(
    store: Store, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lenient = (store.root / "params.yaml").read_text()
    shutil.copy(ROOT / "params.yaml", store.root)
    edit_params(store.root, evaluate__groups=None)
    with pytest.raises(UserError, match=r"not pass the gate .*, so there is still no champion"):
        _run(["promote", "worse"])  # below the floors, with nothing to compare with
    assert "Gate: fail" in capsys.readouterr().out
    assert "champion" not in aliases()
    (store.root / "params.yaml").write_text(lenient)
    assert _run(["promote", "better"]) == 0
    with pytest.raises(UserError, match=r"does not pass the gate .*, so version 2 stays"):
        _run(["promote", "worse"])
    assert "which is significant" in capsys.readouterr().out
    assert aliases()["champion"] == 2
    assert _run(["promote", "worse", "--force", "--reason", "a test"]) == 0
    assert "which is significant" in version(aliases()["champion"]).description


def set_rules(store: Store, drop: float, reference: str | None = None) -> None:
    drops = dict.fromkeys(MaxDrop.model_fields, drop)
    edit_params(store.root, gate__max_drop=drops, gate__reference=reference)


@pytest.mark.parametrize("whose", ["HEAD", "the merge base with main", "the champion"])
def test_looser_rules_of_the_work_tree_promote_nothing(
    store: Store, capsys: pytest.CaptureFixture, whose: str
) -> None:
    assert _run(["promote", "better"]) == 0
    commit = commit_params(store.root, "switch", "--quiet", "--create", "branch")
    made_by = {"HEAD": "0" * 40, "the champion": commit}.get(whose)
    if made_by:
        MlflowClient().set_tag(store.runs["better"], "mlflow.source.git.commit", made_by)
    set_rules(store, drop=0.9)
    if whose != "HEAD":
        commit_params(store.root, "status", "--short")
    if whose == "the champion":
        commit_params(store.root, "branch", "--quiet", "--force", "main")
    with pytest.raises(UserError, match="version 1 stays"):
        _run(["promote", "worse"])
    out = capsys.readouterr().out
    assert f"against the rules of {whose} (" in out
    assert "loosens the gate's rules: gate.max&#95;drop.accuracy from 0.01 to 0.9" in out
    unknown = f"the champion's commit, {made_by or 'not recorded'}, is not in this clone"
    assert (unknown in out) == (whose != "the champion")
    assert aliases() == {"champion": 1, "challenger": 2}
    assert _run(["promote", "worse", "--accept-rule-change"]) == 0
    assert "accepted: looser rules than the baseline's" in capsys.readouterr().out


def test_without_committed_rules_promotion_needs_force(
    store: Store, capsys: pytest.CaptureFixture
) -> None:
    shutil.rmtree(store.root / ".git")
    with pytest.raises(UserError, match="does not pass"):
        _run(["promote", "good"])
    assert "the committed rules cannot be read: git rev-parse failed" in capsys.readouterr().out
    assert _run(["promote", "good", "--force", "--reason", "a trial"]) == 0


def test_promotion_judges_against_the_reference(
    store: Store, capsys: pytest.CaptureFixture
) -> None:
    set_rules(store, drop=0.01, reference="v9")
    with pytest.raises(UserError, match="does not pass"):
        _run(["promote", "good"])
    assert "not judged against gate.reference v9: Cannot read v9" in capsys.readouterr().out


def test_a_reference_with_other_test_images_is_scored_by_its_own_model(
    store: Store, exported: Exported, capsys: pytest.CaptureFixture
) -> None:
    names = [f"other {number}" for number in range(40)]
    manifest = pd.DataFrame({"path": names, "label": [0] * 20 + [1] * 20, "sha256": names})
    log_run(store.root, exported, "release", [True] * 40, manifest)
    shutil.copy(ROOT / "dvc.yaml", store.root)
    (store.root / "metrics").mkdir()
    for name in ("test.json", "predictions.csv"):
        shutil.copy(store.root / "files" / "release" / name, store.root / "metrics" / name)
    commit_params(store.root, "add", "dvc.yaml", "metrics")
    commit_params(store.root, "tag", "v1")
    set_rules(store, drop=0.01, reference="v1")
    with pytest.raises(UserError, match="does not pass"):
        _run(["promote", "good"])
    out = capsys.readouterr().out
    # No dvc.lock records a model there, and no other model stands in for it.
    assert "not judged against gate.reference v1: the model of v1 (" in out
    assert ") cannot be scored on the new test set: dvc.lock of " in out


def new_images(store: Store, exported: Exported) -> pd.DataFrame:
    """Fill data/raw with 40 images, and return their manifest; the exported model is right."""
    shutil.copy(ROOT / "dvc.yaml", store.root)
    raw = store.root / "data" / "raw"
    raw.mkdir(parents=True)
    files = [raw / f"new {number}.png" for number in range(40)]
    for path, pixels in zip(files, exported.images, strict=False):
        path.write_bytes(encode_png(pixels))
    return pd.DataFrame(
        {
            "path": [path.name for path in files],
            "label": (exported.probabilities.ravel()[:40] >= 0.5).astype(int),
            "sha256": [file_sha256(path) for path in files],
        }
    )


@pytest.mark.parametrize("wrong", [0, 20])
def test_the_champion_is_scored_on_the_test_set_of_a_run(
    store: Store, exported: Exported, capsys: pytest.CaptureFixture, wrong: int
) -> None:
    manifest = new_images(store, exported)
    log_run(store.root, exported, "other", [False] * wrong + [True] * (40 - wrong), manifest)
    assert _run(["promote", "good"]) == 0
    capsys.readouterr()
    if wrong:
        with pytest.raises(UserError, match="version 1 stays"):
            _run(["promote", "other"])
    else:
        assert _run(["promote", "other"]) == 0
    out = capsys.readouterr().out
    assert "so the stored model of the champion was scored on 40 images of the new one" in out
    line = next(line for line in out.splitlines() if line.startswith("| accuracy "))
    assert line.replace("|", " ").split()[1:4] == ["40", "1.0000", f"{1 - wrong / 40:.4f}"]
    assert "could not be checked whether the champion was trained on images of the test set" in out


def test_images_that_the_champion_was_trained_on_do_not_count(
    store: Store, exported: Exported, capsys: pytest.CaptureFixture
) -> None:
    manifest = new_images(store, exported)
    fill(store.root, {".dvc/config": "", "dvc.lock": ""})
    splits = store_splits(store.root, train=manifest[:4], validation=manifest[4:5])
    outs = [{"path": "data/splits", "md5": splits}]
    (store.root / "dvc.lock").write_text(yaml.safe_dump({"stages": {"split": {"outs": outs}}}))
    commit = commit_params(store.root, "add", "dvc.yaml", "dvc.lock", ".dvc/config")
    MlflowClient().set_tag(store.runs["good"], "mlflow.source.git.commit", commit)
    listing = json.loads(cached_object(store.root, splits).read_text())
    with mlflow.start_run(store.runs["good"]):
        log.log_inputs(
            {}, {each["relpath"]: cached_object(store.root, each["md5"]) for each in listing}
        )
    (store.root / "dvc.lock").unlink()
    # Wrong on those five alone, which the floor allows.
    log_run(store.root, exported, "other", [False] * 5 + [True] * 35, manifest)
    assert _run(["promote", "good"]) == 0
    capsys.readouterr()
    assert _run(["promote", "other"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("| accuracy "))
    assert line.replace("|", " ").split()[1:4] == ["35", "1.0000", "1.0000"]
    assert "5 of 40 test images are not compared" in out
    assert "could not be checked whether the run was trained" in out
    assert "could not be checked whether the champion" not in out


def test_a_champion_whose_model_is_lost_is_named(store: Store, tmp_path: Path) -> None:
    promote(store, "good")
    shutil.rmtree(logged_model(store.runs["good"]).artifact_location.removeprefix("file://"))
    with pytest.raises(UserError, match="The champion has 0 "):
        registry.fetch_champion_model(tmp_path / "fetched")
