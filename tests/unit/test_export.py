import json
import logging
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ai_edge_litert.interpreter import Interpreter

from facegender.data.manifest import write_table
from facegender.data.processed import ProcessedSplit
from facegender.errors import UserError
from facegender.inference import export
from facegender.inference.export import MAX_FLOAT_DIFFERENCE, representative_images
from facegender.inference.litert import load_litert
from facegender.inference.threshold import read_threshold
from facegender.model.saved_model import load_model
from stages.export import main
from tests.conftest import Exported
from tools.compose_params import ROOT


@pytest.fixture
def processed(exported: Exported, tmp_path: Path) -> Path:
    """Train and validation splits of the exported model's images, labelled as the model says."""
    for name in ("train", "validation"):
        folder = tmp_path / "processed" / name
        folder.mkdir(parents=True)
        np.save(folder / "images.npy", exported.images)
        labels = (exported.probabilities >= 0.5).astype(int)
        index = pd.DataFrame({"path": "x.png", "label": labels, "sha256": "0", "row": range(64)})
        write_table(index, folder / "index.csv")
    return tmp_path / "processed"


def run_stage(
    processed: Path, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict:
    arguments = {
        "params": ROOT / "params.yaml",
        "processed": processed,
        "model": exported.keras,
        "float32": tmp_path / "models" / "a.tflite",
        "int8": tmp_path / "models" / "b.tflite",
        "metrics": tmp_path / "metrics" / "export.json",
    }
    words = [str(word) for key, value in arguments.items() for word in (f"--{key}", value)]
    monkeypatch.setattr(sys, "argv", ["export", *words])
    main()
    return json.loads((tmp_path / "metrics" / "export.json").read_text())


def test_the_fixtures_model_is_not_of_one_mind(exported: Exported) -> None:
    # Else the tests below would compare 0.5 with 0.5.
    assert exported.probabilities.min() < 0.2
    assert exported.probabilities.max() > 0.8


def test_both_formats_say_what_keras_says(exported: Exported) -> None:
    for path, limit in ((exported.float32, MAX_FLOAT_DIFFERENCE), (exported.int8, 0.2)):
        predicted = load_litert(path).predict(exported.images)
        assert predicted.dtype == np.float64
        np.testing.assert_allclose(predicted, exported.probabilities, atol=limit, rtol=0)


def test_int8_is_int8_by_channel_between_uint8_and_float32(exported: Exported) -> None:
    interpreter = Interpreter(str(exported.int8))
    interpreter.allocate_tensors()
    assert interpreter.get_input_details()[0]["dtype"] == np.uint8
    assert interpreter.get_output_details()[0]["dtype"] == np.float32
    tensors = interpreter.get_tensor_details()
    # Activations have a batch of any size, -1.
    kernels = [
        item for item in tensors if len(item["shape"]) == 4 and item["shape_signature"][0] > 1
    ]
    assert len(kernels) >= 14
    assert {item["dtype"] for item in kernels} == {np.int8}
    assert all(len(item["quantization_parameters"]["scales"]) > 1 for item in kernels)
    # In float are the cast from uint8 and the answer.
    assert sum(item["dtype"] == np.float32 for item in tensors) == 2
    assert exported.int8.stat().st_size < 0.5 * exported.float32.stat().st_size


def test_representative_images_are_drawn_by_the_seed(processed: Path) -> None:
    part = ProcessedSplit(processed / "train")
    drawn = representative_images(part, 10, seed=1)
    assert drawn.shape == (10, 32, 32, 3)
    assert len(np.unique(drawn, axis=0)) == 10
    np.testing.assert_array_equal(drawn, representative_images(part, 10, seed=1))
    assert (drawn != representative_images(part, 10, seed=2)).any()
    np.testing.assert_array_equal(representative_images(part, 1000, seed=1), part.images)


def test_the_stage_reports_both_formats(
    processed: Path, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run_stage(processed, exported, tmp_path, monkeypatch)
    assert (tmp_path / "models" / "a.tflite").read_bytes() == exported.float32.read_bytes()
    assert read_threshold(tmp_path / "models" / "a.tflite") == 0.5
    assert report["n"] == 64
    assert report["latency_threads"] == 1
    assert report["float32"]["size_bytes"] == exported.float32.stat().st_size
    assert report["float32"]["accuracy"] == 1
    assert report["float32"]["max_abs_difference"] <= MAX_FLOAT_DIFFERENCE
    assert MAX_FLOAT_DIFFERENCE < report["int8"]["max_abs_difference"] < 0.2
    assert report["int8"]["latency_ms"] > 0


def test_a_float_export_that_says_something_else_fails(
    processed: Path, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    int8 = exported.int8.read_bytes()
    monkeypatch.setattr(export, "convert", lambda model, images: (int8, int8))
    with pytest.raises(UserError, match="not the model that was trained"):
        run_stage(processed, exported, tmp_path, monkeypatch)


def test_int8_that_loses_more_than_a_point_is_warned_of_and_recorded(
    processed: Path,
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    turned = load_model(exported.keras)
    logit = turned.get_layer("logit")
    logit.set_weights([-weight for weight in logit.get_weights()])
    _, int8 = export.convert(turned, exported.images)
    float32 = exported.float32.read_bytes()
    monkeypatch.setattr(export, "convert", lambda model, images: (float32, int8))
    with caplog.at_level(logging.WARNING):
        report = run_stage(processed, exported, tmp_path, monkeypatch)
    assert report["int8_accuracy_loss"] > 0.8
    assert report["int8_accuracy_within_limit"] is False
    assert "int8 loses" in caplog.text
