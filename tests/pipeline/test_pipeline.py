"""The real pipeline, run by DVC in a temporary clone."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml

from facegender.data.processed import ProcessedSplit
from tests.pipeline.conftest import EPOCHS, SMALL, Clone, copy_of, files

pytestmark = pytest.mark.slow


def read_predictions(clone: Clone) -> pd.DataFrame:
    # Pandas' default parser may miss the last bit of a float.
    return pd.read_csv(clone.root / "metrics/predictions.csv", float_precision="round_trip")


def test_it_leaves_everything_that_it_promises(reproduced: Clone) -> None:
    expected = [
        "data/raw.json",
        "data/raw/metadata.csv",
        "data/splits/train.csv",
        "data/splits/validation.csv",
        "data/splits/test.csv",
        "data/processed/test/images.npy",
        "models/model.keras",
        "models/model.tflite",
        "models/model_int8.tflite",
        "metrics/export.json",
        "metrics/data.json",
        "metrics/label_issues.csv",
        "metrics/labels/issues.png",
        "metrics/history.csv",
        "metrics/test.json",
        "metrics/predictions.csv",
        "metrics/robustness.csv",
        "metrics/test/faces.png",
        "metrics/data/class_distribution_train.png",
        "metrics/report.html",
        "docs/model-card.md",
    ]
    assert [path for path in expected if not (reproduced.root / path).is_file()] == []
    raw = json.loads((reproduced.root / "data/raw.json").read_text())
    assert raw["source"] == "sample"
    assert raw["files"] == 81
    data = json.loads((reproduced.root / "metrics/data.json").read_text())
    assert sum(data["counts"]["test"].values()) == 24
    assert data["invalid"] == {"count": 0, "images": []}
    predictions = pd.read_csv(reproduced.root / "metrics/predictions.csv")
    assert list(predictions.columns[:4]) == ["path", "label", "probability", "predicted"]
    assert {"hair", "skin_color", "headwear"} <= set(predictions.columns)
    metrics = json.loads((reproduced.root / "metrics/test.json").read_text())
    right = (predictions["label"] == predictions["predicted"]).mean()
    assert metrics["accuracy"] == pytest.approx(right)


def test_it_prints_no_line_that_looks_like_a_fault(first_repro: Path) -> None:
    # Bars are drawn over themselves.
    lines = re.split(r"[\r\n]+", (first_repro / "stderr").read_text())
    bars = r"(draw|check|compare|preprocess \w+|robustness): .*(image|change)/s\]"
    expected = rf"|{bars}|INFO: .*|WARNING: int8 loses .*"
    assert [line for line in lines if not re.fullmatch(expected, line)] == []


def test_a_second_repro_runs_nothing(reproduced: Clone) -> None:
    output = reproduced.run("dvc", "repro").stdout
    assert reproduced.ran(output) == []
    assert "up to date" in output
    assert len(reproduced.runs()) == 1


def test_one_execution_is_one_run_with_everything(reproduced: Clone) -> None:
    (run,) = reproduced.runs()
    assert run.info.status == "FINISHED"
    assert run.data.params["train.epochs"] == str(EPOCHS)
    assert run.data.params["dataset.source"] == "sample"
    assert "version.tensorflow" in run.data.tags
    commit = reproduced.run("git", "rev-list", "--max-parents=0", "HEAD").stdout.strip()
    assert run.data.tags["mlflow.source.git.commit"] == commit
    client = mlflow.MlflowClient()
    history = pd.read_csv(reproduced.root / "metrics/history.csv")
    for name in ("loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"):
        logged = client.get_metric_history(run.info.run_id, name)
        assert [point.step for point in logged] == list(range(1, EPOCHS + 1))
        np.testing.assert_allclose([point.value for point in logged], history[name])
    metrics = json.loads((reproduced.root / "metrics/test.json").read_text())
    assert run.data.metrics["test_accuracy"] == metrics["accuracy"]
    assert run.data.metrics["test_confusion.male_as_male"] == metrics["confusion"]["male_as_male"]
    inputs = {item.dataset.name: item.dataset.digest for item in run.inputs.dataset_inputs}
    digest = hashlib.sha256((reproduced.root / "data/splits/train.csv").read_bytes()).hexdigest()
    assert set(inputs) == {"train", "validation", "test"}
    assert inputs["train"] == digest[:32]
    logged = {item.path for item in client.list_artifacts(run.info.run_id, "metrics")}
    assert {"metrics/test.json", "metrics/predictions.csv", "metrics/test"} <= logged
    path = reproduced.root / "metrics/robustness.csv"
    robustness = pd.read_csv(path, float_precision="round_trip")
    for row in robustness.itertuples():
        assert run.data.metrics[f"robustness_accuracy.{row.change}"] == row.accuracy
    assert "metrics/robustness.csv" in logged
    pages = {"metrics/report.html", "metrics/model-card.md", "metrics/label_issues.csv"}
    assert pages <= logged
    export = json.loads((reproduced.root / "metrics/export.json").read_text())
    assert run.data.metrics["export_int8.accuracy"] == export["int8"]["accuracy"]
    models = {item.path for item in client.list_artifacts(run.info.run_id, "export")}
    assert models == {"export/model.keras", "export/model.tflite", "export/model_int8.tflite"}


def test_a_bare_mlflow_finds_the_store(reproduced: Clone) -> None:
    code = (
        "import mlflow; print(mlflow.get_tracking_uri());"
        "print(len(mlflow.search_runs(experiment_names=['facegender'])))"
    )
    uri, count = reproduced.run("python", "-c", code).stdout.split()[-2:]
    assert (reproduced.root / uri.removeprefix("sqlite:///")) == reproduced.root / "mlflow.db"
    assert count == "1"
    assert list((reproduced.root / "mlruns" / "facegender" / "models").iterdir())


def test_the_logged_model_takes_bytes_and_arrays(reproduced: Clone) -> None:
    (run,) = reproduced.runs()
    (logged,) = mlflow.search_logged_models([run.info.experiment_id], output_format="list")
    model = mlflow.pyfunc.load_model(logged.model_uri)
    assert model.metadata.signature is not None
    assert model.input_example is not None or model.metadata.saved_input_example_info
    test = ProcessedSplit(reproduced.root / "data/processed/test")
    expected = read_predictions(reproduced)
    content = [(reproduced.root / "data/raw" / path).read_bytes() for path in expected["path"]]
    for images in (pd.DataFrame({"image": content}), content, np.array(test.images)):
        predicted = model.predict(images)
        np.testing.assert_array_equal(predicted["probability"], expected["probability"])
        names = expected["predicted"].map({0: "female", 1: "male"})
        assert list(predicted["label"]) == list(names)
    with pytest.raises(mlflow.MlflowException, match="not an image"):
        model.predict([b"not an image"])


def test_predict_says_what_evaluate_said(reproduced: Clone) -> None:
    # TensorFlow, for which not all workers should wait.
    from facegender.inference.export import MAX_FLOAT_DIFFERENCE

    expected = read_predictions(reproduced)
    paths = [f"data/raw/{path}" for path in expected["path"]]
    lines = reproduced.run("facegender", "predict", "--json", *paths).stdout.splitlines()
    said = pd.DataFrame([json.loads(line) for line in lines])
    np.testing.assert_array_equal(said["probability"], expected["probability"])
    slow = ("facegender", "predict", "--json", "--model", "models/model.keras", *paths)
    said = pd.DataFrame([json.loads(line) for line in reproduced.run(*slow).stdout.splitlines()])
    np.testing.assert_allclose(
        said["probability"], expected["probability"], atol=MAX_FLOAT_DIFFERENCE, rtol=0
    )
    (reproduced.root / "broken.jpg").write_bytes(b"?")
    done = reproduced.run("facegender", "predict", "--csv", "broken.jpg", paths[0], check=False)
    (reproduced.root / "broken.jpg").unlink()
    header, broken, good = done.stdout.splitlines()
    assert header == "image,label,probability,error,left,top,width,height,score"
    assert broken == "broken.jpg,,,not an image in a known format,,,,,"
    assert good.startswith(paths[0])
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("path", "stages"),
    [
        ("facegender/tracking/log.py", "report"),
        ("facegender/gate/judge.py", "report"),
        ("facegender/report/page.py", "report"),
        ("facegender/data/images.py", "split preprocess evaluate report"),
        ("facegender/training/augmentation.py", "train report"),
        ("facegender/evaluation/label_audit.py", "audit_labels report"),
    ],
)
def test_an_edit_reruns_what_it_decides_and_nothing_else(
    reproduced: Clone, path: str, stages: str
) -> None:
    file = reproduced.root / path
    before = file.read_text()
    file.write_text(f"{before}# edited\n")
    try:
        # The stages whose own inputs changed; those after them run if an output changes.
        changed = json.loads(reproduced.run("dvc", "status", "--json").stdout)
    finally:
        file.write_text(before)
    assert set(changed) == set(stages.split())


def test_another_version_of_a_package_reruns_what_it_decides(reproduced: Clone) -> None:
    expected = {
        "tensorflow": "audit_labels train export",
        "keras": "audit_labels train export",
        "ai-edge-litert": "split preprocess export evaluate",
        "pillow": "download split preprocess audit_labels evaluate",
        "scikit-learn": "split audit_labels train evaluate",
    }
    file = reproduced.root / "conf/packages.yaml"
    before = file.read_text()
    edited = before
    for package in expected:
        edited = edited.replace(f"\n{package}: [", f"\n{package}: [9.9, ")
    file.write_text(edited)
    try:
        changed = json.loads(reproduced.run("dvc", "status", "--json").stdout)
    finally:
        file.write_text(before)
    # DVC names the packages, so one look tells what each of them alone would do.
    found: dict[str, set[str]] = {package: set() for package in expected}
    for stage, (change,) in changed.items():
        ((path, packages),) = change["changed deps"].items()
        assert path == "conf/packages.yaml"
        for package in packages:
            found[package].add(stage)
    assert found == {package: set(stages.split()) for package, stages in expected.items()}


def test_another_file_at_the_path_of_the_weights_trains_again(
    reproduced: Clone, tmp_path: Path
) -> None:
    clone = copy_of(reproduced, tmp_path)
    weights = tmp_path / "my weights[1].v2.h5"
    weights.write_bytes(b"one")
    clone.compose(*SMALL, f"model.weights='{weights}'")
    params = yaml.safe_load((clone.root / "params.yaml").read_text())
    assert params["model"]["input"] == str(weights)
    # As after a training: DVC records what is there.
    clone.run("dvc", "commit", "--force", "train")
    assert "train" not in json.loads(clone.run("dvc", "status", "--json").stdout)
    weights.write_bytes(b"two")
    (changed,) = json.loads(clone.run("dvc", "status", "--json").stdout)["train"]
    assert changed == {"changed deps": {str(weights): "modified"}}


def test_a_change_reruns_what_depends_on_it(reproduced: Clone, tmp_path: Path) -> None:
    clone = copy_of(reproduced, tmp_path)
    with (clone.root / "facegender/evaluation/metrics.py").open("a") as file:
        file.write("# touched\n")
    before = files(clone.root / "models")
    # What another training reruns: test_gate.py.
    assert clone.ran(clone.run("dvc", "repro").stdout) == ["evaluate", "report"]
    assert files(clone.root / "models") == before


@pytest.mark.parametrize(
    ("stage", "table"),
    [
        pytest.param("preprocess", "data/splits/test.csv", id="preprocess"),
        pytest.param(
            "evaluate", "metrics/predictions.csv", id="evaluate", marks=pytest.mark.campaign
        ),
    ],
)
def test_the_folder_source_its_metadata_and_its_unreadable_images(
    new_clone: Callable[..., Clone], make_images: Callable[..., Path], stage: str, table: str
) -> None:
    folder = make_images("faces", per_class=30, classes=("Women", "men"))
    ages = "".join(f"Women/{number:03}.png,{20 + number}\n" for number in range(30))
    (folder / "ages.csv").write_text("file,age\n" + ages)
    (folder / "men" / "007.png").write_bytes(b"broken")
    clone = new_clone()
    params = (*SMALL[2:], "train.epochs=0", "dataset=folder", f"dataset.path={folder}")
    clone.compose(*params, "data.max_invalid_fraction=0")
    refused = clone.run("dvc", "repro", "preprocess", check=False)
    assert refused.returncode != 0
    assert "men/007.png: not an image in a known format" in refused.stderr
    assert "Traceback" not in refused.stderr
    clone.compose(*params, "data.max_invalid_fraction=0.1")
    clone.run("dvc", "repro", stage)
    data = json.loads((clone.root / "metrics/data.json").read_text())
    assert data["invalid"]["images"] == [
        {"path": "men/007.png", "reason": "not an image in a known format"}
    ]
    assert "age" in pd.read_csv(clone.root / table).columns
    (folder / "men" / "007.png").unlink()
    ran = clone.ran(clone.run("dvc", "repro", "preprocess").stdout)
    assert ran == ["list@folder", "download", "split", "preprocess"]


@pytest.fixture(scope="module")
def copied(reproduced: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A copy for tests that leave files and read others."""
    return copy_of(reproduced, tmp_path_factory.mktemp("copied"))


@pytest.mark.parametrize(
    "command",
    [
        ["dvc", "metrics", "show"],
        ["dvc", "metrics", "diff", "HEAD~1"],
        ["dvc", "params", "diff", "--all", "HEAD~1"],
        ["dvc", "plots", "show", "--out", "plots-shown"],
        ["dvc", "exp", "show", "--no-pager"],
        ["dvc", "dag"],
    ],
    ids=lambda command: " ".join(command[1:3]),
)
def test_dvcs_own_commands_work_plainly(copied: Clone, command: list[str]) -> None:
    assert copied.run(*command).stdout.strip()


def test_dvc_shows_every_picture_of_two_commits(copied: Clone) -> None:
    pictures = sorted(
        path.relative_to(copied.root).as_posix()
        for path in (copied.root / "metrics").rglob("*.png")
    )
    command = ("dvc", "plots", "diff", "HEAD", "--json", "--out", "plots-shown-too")
    found = json.loads(copied.run(*command).stdout)["data"]
    shown = {
        name: sorted(one["revisions"][0] for one in plots)
        for name, plots in found.items()
        if plots[0]["type"] == "image"
    }
    assert shown == {picture: ["HEAD", "workspace"] for picture in pictures}


def test_a_bad_parameter_stops_the_pipeline_with_one_paragraph(
    reproduced: Clone, tmp_path: Path
) -> None:
    clone = copy_of(reproduced, tmp_path)
    text = (clone.root / "params.yaml").read_text()
    (clone.root / "params.yaml").write_text(text.replace(f"epochs: {EPOCHS}", "epochs: -2", 1))
    done = clone.run("dvc", "repro", check=False)
    assert done.returncode != 0
    assert "epochs" in done.stderr
    assert "Traceback" not in done.stderr
