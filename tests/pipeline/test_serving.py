"""The champion behind a real `mlflow models serve`, over HTTP."""

import base64
import json
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from typing import Any

import numpy as np
import pandas as pd
import pytest

from facegender.data.processed import ProcessedSplit
from tests.bad_images import declared
from tests.pipeline.conftest import HOST, Clone, copy_of, served

pytestmark = pytest.mark.slow

SERVE = ("mlflow", "models", "serve", "-m", "models:/facegender@champion", "--env-manager", "local")
Post = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def champion(reproduced: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone with a champion that tells images apart, though it is not yet fit for that."""
    clone = copy_of(reproduced, tmp_path_factory.mktemp("champion"))
    clone.run("facegender", "relocate")
    run = json.loads((clone.root / "models/run.json").read_text())["run_id"]
    done = clone.run("facegender", "promote", run, "--force", "--reason", "to be served")
    assert "is the champion now" in done.stdout
    return clone


@pytest.fixture(scope="module")
def post(champion: Clone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Post]:
    """Return a function that sends a body to the server, and gives its status and answer."""
    log = tmp_path_factory.mktemp("serve") / "serve.log"
    with served(champion, SERVE, log) as port:

        def send(body: Any, content_type: str = "application/json") -> tuple[int, Any]:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection = HTTPConnection(HOST, port, timeout=120)
            connection.request("POST", "/invocations", data, {"Content-Type": content_type})
            response = connection.getresponse()
            return response.status, json.loads(response.read())

        yield send


@pytest.fixture(scope="module")
def expected(champion: Clone) -> pd.DataFrame:
    # Pandas' default parser may miss the last bit of a float.
    return pd.read_csv(champion.root / "metrics/predictions.csv", float_precision="round_trip")


@pytest.fixture(scope="module")
def content(champion: Clone, expected: pd.DataFrame) -> list[bytes]:
    return [(champion.root / "data/raw" / path).read_bytes() for path in expected["path"]]


def said(answer: tuple[int, Any]) -> list[float]:
    status, body = answer
    assert status == 200, body
    return [item["probability"] for item in body["predictions"]]


def test_the_same_bytes_give_the_same_probability_everywhere(
    champion: Clone, post: Post, expected: pd.DataFrame, content: list[bytes]
) -> None:
    test = ProcessedSplit(champion.root / "data/processed/test")
    text = [base64.b64encode(item).decode() for item in content]
    paths = [f"data/raw/{path}" for path in expected["path"]]
    lines = champion.run("facegender", "predict", "--json", *paths).stdout.splitlines()
    everywhere = {
        "evaluate": expected["probability"],
        "predict": [json.loads(line)["probability"] for line in lines],
        "server, bytes": said(post({"inputs": text})),
        "server, bytes in a table": said(
            post({"dataframe_split": {"columns": ["image"], "data": [[item] for item in text]}})
        ),
        "server, one by one": [said(post({"instances": [item]}))[0] for item in text],
        "server, arrays": said(post({"inputs": test.images[test.rows].tolist()})),
    }
    table = pd.DataFrame({place: np.array(values) for place, values in everywhere.items()})
    # All of them run the same file on the same runtime.
    pd.testing.assert_series_equal(table.max(axis=1), table.min(axis=1), check_exact=True)
    # Else all of this could be true of a model that says the same of every image.
    assert table["evaluate"].nunique() > 10


def test_bad_input_is_refused_and_the_server_lives_on(post: Post, content: list[bytes]) -> None:
    good = base64.b64encode(content[0]).decode()
    cut = base64.b64encode(content[0][: len(content[0]) // 2]).decode()
    before = said(post({"inputs": [good]}))
    for body, reason in [
        ({"inputs": [cut]}, "Image 0: cannot be decoded"),
        ({"inputs": [base64.b64encode(b"?").decode()]}, "Image 0: not an image"),
        ({"inputs": [base64.b64encode(declared(60_000, 60_000)).decode()]}, "Image 0: too large"),
        ({"inputs": [base64.b64encode(declared(12_000, 12_000)).decode()]}, "Image 0: too large"),
        ({"inputs": [good], "params": {"abstain_below": 2}}, "from 0 to 1"),
        (b"no JSON", "valid JSON"),
        (b"\xff", "valid JSON"),
        (b"", "valid JSON"),
    ]:
        status, answer = post(body)
        assert status == 400, answer
        assert reason in answer["message"]
        assert "stack_trace" not in answer
        assert "Traceback" not in str(answer)
        assert len(str(answer)) < 1000
    assert said(post({"inputs": [good]})) == before
