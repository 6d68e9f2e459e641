"""The page to try a model: what it answers, and to whom."""

import base64
import io
import shutil
import socket
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from flask.testing import FlaskClient
from PIL import Image

from facegender.cli import demo
from facegender.cli.main import _run
from facegender.data.images import encode_png
from facegender.errors import UserError
from facegender.faces.settings import FaceCrop
from facegender.inference.litert import load_litert
from facegender.inference.model_crop import write_crop
from facegender.inference.predictor import Predictor
from tests.conftest import Exported, fill, free_port
from tests.unit.conftest import two_faces


@pytest.fixture
def client(exported: Exported) -> FlaskClient:
    return demo.create_app(load_litert(exported.float32), 0.5).test_client()


def picture_of(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def test_a_picture_is_judged_as_the_model_sees_it(client: FlaskClient, exported: Exported) -> None:
    for pixels, probability in list(zip(exported.images, exported.probabilities, strict=True))[:4]:
        answer = client.post("/predict", data=encode_png(pixels)).get_json()
        (face,) = answer["faces"]
        assert face["probability"] == pytest.approx(probability, abs=1e-4)
        male = face["probability"] >= 0.5
        assert face["label"] == ("male" if male else "female")
        likely = face["probability"] if male else 1 - face["probability"]
        assert (face["confidence"], face["box"]) == (likely, None)
        np.testing.assert_array_equal(np.asarray(picture_of(face["crop"])), pixels)
        assert (answer["width"], answer["height"], answer["left_out"]) == (32, 32, 0)


def test_a_large_picture_is_shown_smaller_and_upright(client: FlaskClient) -> None:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (2560, 640), (90, 120, 60)).save(buffer, "JPEG", exif=exif)
    answer = client.post("/predict", data=buffer.getvalue()).get_json()
    assert (answer["width"], answer["height"]) == (640, 2560)
    assert picture_of(answer["picture"]).size == (320, 1280)


@pytest.mark.parametrize("size", [(10_000, 3), (3, 10_000)])
def test_a_strip_is_shown(client: FlaskClient, size: tuple[int, int]) -> None:
    answer = client.post("/predict", data=encode_png(np.zeros((*size, 3), np.uint8))).get_json()
    assert min(picture_of(answer["picture"]).size) == 1


def test_faces_have_boxes_and_the_largest_are_shown(
    exported: Exported, portrait: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copy(exported.float32, tmp_path))
    write_crop(model, FaceCrop(margin=0.25, align=False, min_score=0.75, min_size=24))
    monkeypatch.setattr(demo, "MAX_FACES", 1)
    two = encode_png(np.asarray(two_faces(portrait)))
    answer = demo.judge(two, load_litert(model), 0.5)
    assert (len(answer["faces"]), answer["left_out"]) == (1, 1)
    assert 30 < answer["faces"][0]["box"]["left"] < 280
    none = encode_png(np.zeros((90, 90, 3), np.uint8))
    assert demo.judge(none, load_litert(model), 0.5)["faces"] == []


def test_the_map_shows_the_square_that_the_model_looks_at() -> None:
    # Its answer depends on the second square of the third row alone.
    looks = Predictor(70, lambda batch: batch[:, 20:30, 10:20].mean((1, 2, 3)) / 255)
    client = demo.create_app(looks, 0.5).test_client()
    white = encode_png(np.full((70, 70, 3), 255, np.uint8))
    found = np.array(client.post("/map", data=white).get_json()["map"])
    expected = np.zeros((7, 7))
    expected[2, 1] = 1 - 128 / 255
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_squares_cover_every_pixel_of_a_side_that_seven_does_not_divide() -> None:
    seen: list[np.ndarray] = []
    looks = Predictor(32, lambda batch: seen.extend(batch.copy()) or np.zeros(len(batch)))
    assert demo.occlusion_map(np.zeros((32, 32, 3), np.uint8), looks).shape == (7, 7)
    assert len(seen) == 50
    np.testing.assert_array_equal(np.sum([image > 0 for image in seen], axis=0), 1)


@pytest.mark.parametrize("path", ["/predict", "/map"])
def test_bad_uploads_are_named(
    exported: Exported, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "MAX_UPLOAD_BYTES", 1 << 20)
    client = demo.create_app(load_litert(exported.float32), 0.5).test_client()
    for content, code, reason in (
        (b"%PDF-1.7", 422, "PDF is not supported"),
        (b"", 422, "the file is empty"),
        (bytes(1 << 20), 422, "not an image"),
        (bytes((1 << 20) + 1), 413, "The file has more than 1 MiB."),
    ):
        answer = client.post(path, data=content)
        assert answer.status_code == code
        assert reason in answer.get_json()["error"]


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": "127.0.0.1:5002"}, 200),
        ({"Host": "localhost:5002", "Origin": "http://localhost:5002"}, 200),
        ({"Host": "rebound.example"}, 400),
        ({"Host": "127.0.0.1.rebound.example:5002"}, 400),
        ({"Host": "127.0.0.1:5002", "Origin": "http://127.0.0.1:80"}, 403),
        ({"Host": "127.0.0.1:5002", "Origin": "null"}, 403),
    ],
)
def test_only_its_own_page_may_ask(
    client: FlaskClient, exported: Exported, headers: dict[str, str], code: int
) -> None:
    for answer in (
        client.get("/", headers=headers),
        client.post("/predict", data=encode_png(exported.images[0]), headers=headers),
    ):
        assert answer.status_code == code
        assert code == 200 or list(answer.get_json()) == ["error"]


def test_the_page_may_load_nothing_from_outside(client: FlaskClient) -> None:
    page = client.get("/")
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "not facts about a person" in page.text
    for path in ("/page/page.css", "/page/page.js"):
        assert path in page.text
        assert client.get(path).status_code == 200
    assert client.get("/page/../demo.py").status_code == 404
    assert list(client.get("/nothing").get_json()) == ["error"]


def test_a_model_that_fails_is_an_error_in_json() -> None:
    fail = Mock(side_effect=RuntimeError("secret"))
    client = demo.create_app(Predictor(32, fail), 0.5).test_client()
    answer = client.post("/predict", data=encode_png(np.zeros((9, 9, 3), np.uint8)))
    assert answer.status_code == 500
    assert "secret" not in answer.get_json()["error"]


def test_a_model_of_the_sample_says_so(
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    model = exported.float32.read_bytes()
    fill(tmp_path, {"data/raw.json": '{"source": "sample"}', "models/model.tflite": model})
    monkeypatch.setattr("facegender.cli.demo.project_root", lambda: tmp_path)
    server = Mock(serve_forever=Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr("werkzeug.serving.make_server", Mock(return_value=server))
    assert _run(["demo", "--port", str(free_port())]) == 0
    assert "note: model.tflite was trained only on the sample's cartoons" in capsys.readouterr().err


def test_a_port_in_use_is_named() -> None:
    with socket.create_server((demo.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} cannot be used"):
            _run(["demo", "--port", str(port)])
