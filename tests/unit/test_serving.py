"""Answers of MLflow's scoring server, without starting it."""

import base64
import io
import json
import math
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel
from mlflow.pyfunc.scoring_server import invocations

from facegender.data.images import encode_png
from facegender.errors import UserError
from facegender.inference.litert import load_litert
from facegender.inference.predictor import Predictor
from facegender.inference.serving import FaceGender
from tests.conftest import Exported, logged_model, run_python
from tests.unit.conftest import Store
from tools.compose_params import ROOT

Ask = Callable[[Any], tuple[int, Any]]


@pytest.fixture(scope="module")
def model(filled: Store) -> PyFuncModel:
    mlflow.set_tracking_uri(f"sqlite:///{filled.root / 'mlflow.db'}")
    return mlflow.pyfunc.load_model(logged_model(filled.runs["good"]).model_uri)


def test_images_are_predicted_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def predict(batch: np.ndarray) -> np.ndarray:
        sizes.append(len(batch))
        return batch[:, 0, 0, 0] / 255.0

    monkeypatch.setattr(
        "facegender.inference.serving.load_litert", lambda path, threads: Predictor(8, predict)
    )
    served = FaceGender()
    served.load_context(
        SimpleNamespace(artifacts={"model": str(tmp_path)}, model_config={"threshold": 0.5})
    )
    levels = np.arange(0, 250, 25, dtype=np.uint8)
    answer = served.predict(None, list(np.broadcast_to(levels[:, None, None, None], (10, 8, 8, 3))))
    assert sizes == [4, 4, 2]
    np.testing.assert_array_equal(answer["probability"], levels / 255.0)


@pytest.mark.parametrize("threshold", [0, 1, math.nan])
def test_a_threshold_that_labels_all_alike_is_refused(exported: Exported, threshold: float) -> None:
    context = SimpleNamespace(
        artifacts={"model": exported.float32}, model_config={"threshold": threshold}
    )
    with pytest.raises(UserError, match="threshold is a probability between 0 and 1, not"):
        FaceGender().load_context(context)


@pytest.fixture(scope="module")
def ask(model: PyFuncModel) -> Ask:
    """Return a function that gives the server's status and answer for a body."""

    def post(body: Any) -> tuple[int, Any]:
        try:
            # The server's way to parse a request.
            answer = invocations(json.dumps(body), "application/json", model, None)
        except MlflowException as error:
            return error.get_http_status_code(), json.loads(error.serialize_as_json())
        return answer.status, json.loads(answer.response)

    return post


@pytest.fixture(scope="module")
def expected(exported: Exported) -> np.ndarray:
    return load_litert(exported.float32).predict(exported.images)


def base64_png(image: np.ndarray) -> str:
    return base64.b64encode(encode_png(image)).decode()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda items: {"inputs": items},
        lambda items: {"inputs": {"image": items}},
        lambda items: {"inputs": [{"image": item} for item in items]},
        lambda items: {"instances": items},
        lambda items: {"instances": [{"image": item} for item in items]},
        lambda items: {"dataframe_records": [{"image": item} for item in items]},
        lambda items: {"dataframe_split": {"data": [[item] for item in items]}},
        lambda items: {
            "dataframe_split": {"columns": ["image"], "data": [[item] for item in items]}
        },
    ],
)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["base64", "array"])
def test_every_way_to_send_images(
    ask: Ask, exported: Exported, expected: np.ndarray, wrap: Callable, count: int, kind: str
) -> None:
    sent = exported.images[:count]
    items = [base64_png(image) if kind == "base64" else image.tolist() for image in sent]
    status, answer = ask(wrap(items))
    assert status == 200, answer
    said = [item["probability"] for item in answer["predictions"]]
    np.testing.assert_array_equal(said, expected[:count])
    names = ["male" if probability >= 0.5 else "female" for probability in said]
    assert [item["label"] for item in answer["predictions"]] == names


def test_images_of_other_sizes_and_one_alone(ask: Ask, exported: Exported) -> None:
    large = np.kron(exported.images[0], np.ones((2, 2, 1), np.uint8))
    status, by_pixels = ask({"inputs": large.tolist()})
    assert status == 200
    assert ask({"inputs": base64_png(large)}) == (200, by_pixels)


def test_it_abstains_when_asked(ask: Ask, exported: Exported, expected: np.ndarray) -> None:
    items = [base64_png(image) for image in exported.images]
    _, answer = ask({"inputs": items, "params": {"abstain_below": 0.8}})
    labels = np.array([item["label"] for item in answer["predictions"]])
    unsure = np.maximum(expected, 1 - expected) < 0.8
    assert 0 < unsure.sum() < 64
    np.testing.assert_array_equal(labels == "uncertain", unsure)
    _, answer = ask({"inputs": items, "params": {"abstain_below": 1}})
    assert {item["label"] for item in answer["predictions"]} == {"uncertain"}


BROKEN = base64.b64encode(b"GIF89a and no more").decode()
GOOD = base64_png(np.zeros((8, 8, 3), np.uint8))

CUT = base64.b64encode(
    encode_png(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8))[:5000]
).decode()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"inputs": [GOOD, BROKEN]}, "Image 1: not an image in a known format"),
        ({"inputs": [CUT]}, "Image 0: cannot be decoded"),
        ({"inputs": ["photo.jpg"]}, "Image 0: not base64 text"),
        ({"inputs": ["ünlesbar"]}, "Image 0"),
        ({"inputs": [""]}, "Image 0: not an image"),
        ({"inputs": []}, "There is no image"),
        ({"instances": []}, "There is no image"),
        ({"dataframe_split": {"columns": ["image"], "data": []}}, "There is no image"),
        ({"dataframe_records": []}, "One column of images is expected, not"),
        (
            {"dataframe_split": {"columns": ["a", "b"], "data": [[GOOD, GOOD]]}},
            "One column of images is expected, not ['a', 'b']",
        ),
        ({"inputs": {"a": [GOOD], "b": [GOOD]}}, "One field of images is expected"),
        ({"inputs": [{"a": GOOD, "b": GOOD}]}, "One field of images is expected"),
        ({"dataframe_records": [{"image": None}]}, "Image 0: base64 text, bytes, or an array"),
        ({"inputs": 5}, "Image 0: base64 text, bytes, or an array"),
        ({"inputs": None}, "Image 0: base64 text, bytes, or an array"),
        ({"inputs": [1, 2, 3]}, "of shape ()"),
        ({"inputs": [[[1, 2], [3, 4]]]}, "of shape (1, 2, 2)"),
        ({"inputs": np.zeros((1, 8, 8, 4), int).tolist()}, "of shape (8, 8, 4)"),
        ({"inputs": np.zeros((1, 8, 8, 3)).tolist()}, "whole numbers from 0 to 255"),
        ({"inputs": np.full((1, 8, 8, 3), 256).tolist()}, "whole numbers from 0 to 255"),
        ({"inputs": np.full((1, 8, 8, 3), -1).tolist()}, "whole numbers from 0 to 255"),
        ({"inputs": [[[[1, 2, 3]], [[1, 2]]]]}, ""),
        ({"inputs": [GOOD], "params": {"abstain_below": -1}}, "from 0 to 1, not '-1'"),
        *(
            ({"inputs": [GOOD], "params": {"abstain_below": value}}, f"from 0 to 1, not {shown}")
            for value, shown in (
                ("x", "'x'"),
                (None, "'None'"),
                (True, "'True'"),
                ([0.9], "'[0.9]'"),
            )
        ),
        (
            {"inputs": [GOOD], "params": {"abstain_bellow": 0.9}},
            "are abstain_below, whole, not ['abstain_bel",
        ),
        ({"inputs": [GOOD], "params": {"whole": 1}}, "whole is true or false, not '1'"),
        ({"inputs": [GOOD], "params": {"whole": None}}, "whole is true or false, not 'None'"),
        ({"inputs": [GOOD], "params": 5}, "params"),
        ({"images": [GOOD]}, "exactly one of the input fields"),
        ([GOOD], "Received a list"),
        (None, ""),
    ],
)
def test_bad_input_is_a_400_with_a_clear_text(ask: Ask, body: Any, reason: str) -> None:
    status, answer = ask(body)
    assert status == 400, answer
    assert reason in answer["message"]
    assert GOOD not in answer["message"]  # which can be megabytes
    assert "stack_trace" not in answer
    assert "Traceback" not in answer["message"]


def test_the_answer_to_a_large_broken_image_is_short(ask: Ask) -> None:
    status, answer = ask({"inputs": [base64.b64encode(bytes(10**6)).decode()]})
    assert status == 400
    assert answer["message"] == "Image 0: not an image in a known format"


def test_requests_at_once_do_not_mix(ask: Ask, exported: Exported, expected: np.ndarray) -> None:
    def one(index: int) -> float:
        _, answer = ask({"inputs": [exported.images[index].tolist()] * (1 + index % 3)})
        assert len({item["probability"] for item in answer["predictions"]}) == 1
        return answer["predictions"][0]["probability"]

    with ThreadPoolExecutor(8) as pool:
        np.testing.assert_array_equal(list(pool.map(one, range(64))), expected)


def test_bytes_in_a_table(model: PyFuncModel, exported: Exported, expected: np.ndarray) -> None:
    assert (
        model.predict([bytearray(encode_png(exported.images[0]))])["probability"][0] == expected[0]
    )
    table = pd.DataFrame({"image": [encode_png(image) for image in exported.images]})
    np.testing.assert_array_equal(model.predict(table)["probability"], expected)


@pytest.mark.parametrize("form", [pd.Series, lambda images: pd.DataFrame({"image": images})])
def test_answers_have_the_index_of_the_table(
    model: PyFuncModel, exported: Exported, expected: np.ndarray, form: Callable
) -> None:
    table = form([encode_png(image) for image in exported.images])
    some = model.predict(table[expected > 0.5])
    assert some["probability"].tolist() == pd.Series(expected)[expected > 0.5].tolist()
    assert some.index.tolist() == np.flatnonzero(expected > 0.5).tolist()


def test_a_model_logged_before_the_package_had_folders_still_scores(
    filled: Store, exported: Exported, expected: np.ndarray, tmp_path: Path
) -> None:
    """MLflow prefers the new package's modules to the model's own in a process that has them."""
    location = logged_model(filled.runs["good"]).artifact_location
    model = shutil.copytree(location.removeprefix("file://"), tmp_path / "model")
    shutil.rmtree(model / "code")
    archive = subprocess.run(
        ["git", "archive", "--format=zip", "824cb2f", "facegender"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if archive.returncode:
        pytest.skip("the commit that logged such models is not in this clone")
    with zipfile.ZipFile(io.BytesIO(archive.stdout)) as old:
        old.extractall(model / "code")
    shutil.copy(model / "code" / "facegender" / "serving.py", model / "serving.py")
    described = yaml.safe_load((model / "MLmodel").read_text())
    parameter = {"name": "abstain_below", "default": 0.5, "shape": None, "type": "double"}
    described["signature"]["params"] = json.dumps([parameter])
    (model / "MLmodel").write_text(yaml.safe_dump(described))
    (tmp_path / "image.png").write_bytes(encode_png(exported.images[0]))
    code = (
        "import sys, pathlib, mlflow, facegender.cli.main, facegender.inference.serving\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "print(*model.predict([pathlib.Path(sys.argv[2]).read_bytes()])['probability'])"
    )
    done = run_python(code, model, tmp_path / "image.png")
    assert float(done.stdout) == expected[0]
