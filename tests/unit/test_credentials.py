"""What is blanked, and what is not; tests/pipeline/test_secrets.py looks for leaks at work."""

import base64
import getpass
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from facegender.runtime.redaction import move_tracking_credentials, secrets_of, without_credentials
from tests.conftest import run_python

SECRET = "canary-value"


@pytest.mark.parametrize(
    "name",
    [
        "KAGGLE_KEY",
        "KAGGLE_API_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AZURE_STORAGE_CONNECTION_STRING",
        "SOME_APIKEY",
        "DB_PASS",
        "DATABASE_PWD",
        "GITHUB_PAT",
    ],
)
def test_values_of_secret_variables_are_blanked(name: str) -> None:
    assert without_credentials(f"a {SECRET}!", secrets_of({name: SECRET})) == "a ***!"


@pytest.mark.parametrize(
    "name",
    [
        "KEYBOARD_LAYOUT",
        "MONKEY",
        "HOME",
        "MLFLOW_TRACKING_URI",
        "PWD",
        "OLDPWD",
        "PATH",
        "COMPASS",
    ],
)
def test_values_of_other_variables_are_not(name: str) -> None:
    assert secrets_of({name: SECRET}) == []


def test_a_short_value_is_left_for_the_texts_sake() -> None:
    assert secrets_of({"TOKENIZERS_PARALLELISM": "false", "API_TOKEN": ""}) == []


def test_a_password_in_an_address_is_a_secret_as_written_and_decoded() -> None:
    found = secrets_of({"http_proxy": "http://ada:p%40ssword@127.0.0.1:3128"})
    assert sorted(found) == ["p%40ssword", "p@ssword"]
    assert secrets_of({"A": "http://[broken", "B": "http://host/path"}) == []


def test_a_secret_within_another_leaves_no_rest() -> None:
    secrets = secrets_of({"A_TOKEN": "canary", "B_TOKEN": "canary-and-more"})
    assert without_credentials("canary-and-more", secrets) == "***"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET https://ada:pw@host/x failed", "GET https://***@host/x failed"),
        ("https://ada:p@ss@host", "https://***@host"),
        ("postgresql://ada:pw@host/db", "postgresql://***@host/db"),
        ("https://h/f?a=1&X-Goog-Signature=abc&b=2", "https://h/f?a=1&X-Goog-Signature=***&b=2"),
        (
            "https://h/f?AWSAccessKeyId=abc&Signature=d",
            "https://h/f?AWSAccessKeyId=***&Signature=***",
        ),
        ("{'Authorization': 'Bearer abc.def1'}", "{'Authorization': 'Bearer ***'}"),
        ("Authorization: Basic YWRhOnB3", "Authorization: Basic ***"),
        ('{"access_token": "a b\\"c", "n": "1"}', '{"access_token": "***", "n": "1"}'),
        (r'"{\"access_token\": \"abc\"}"', r'"{\"access_token\": \"***\"}"'),
        ("{'client_secret' : 'abc'}", "{'client_secret' : '***'}"),
        ("host=h password=abc user=ada", "host=h password=*** user=ada"),
        ("host=h password='a b\\'c' user=ada", "host=h password=*** user=ada"),
        ("DB_PASS=abc; DB_PWD=d GH_PAT=e", "DB_PASS=***; DB_PWD=*** GH_PAT=***"),
    ],
)
def test_addresses_and_headers_are_blanked(text: str, expected: str) -> None:
    assert without_credentials(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/#/experiments/1",
        "write to ada@example.org, see https://example.org/",
        "Basic knowledge is enough; the Bearer knows",
        "https://host/page?width=3&height=4",
        "max_tokens=5 key=value monkey='x' PWD=/home/ada",
        '{"tokens": "5", "keyboard": "de"}',
        "",
    ],
)
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert without_credentials(text) == text


@pytest.mark.parametrize(
    "unit",
    ["token", "?token", "://a", "'token':", "'token':'", '"token":\\"', "a=", "a='", "Bearer "],
)
def test_the_time_grows_with_the_text_and_not_with_its_square(unit: str) -> None:
    """The square of so long a text would take a quarter of an hour."""
    long = without_credentials("?" + unit * (300_000 // len(unit)))
    assert len(long) > 0


@pytest.mark.parametrize(
    ("address", "left", "name", "password"),
    [
        ("http://ada:pw@host:5000", "http://host:5000", "ada", "pw"),
        ("https://ada:p%40w@host/mlflow/", "https://host/mlflow/", "ada", "p@w"),
        ("https://ada:p@w@host", "https://host", "ada", "p@w"),
        ("http://ada@host", "http://host", None, None),
        ("http://host/a@b", "http://host/a@b", None, None),
        ("postgresql://ada:pw@host/db", "postgresql://ada:pw@host/db", None, None),
        ("sqlite:///a@b.db", "sqlite:///a@b.db", None, None),
        ("", "", None, None),
    ],
)
def test_credentials_leave_the_tracking_address(
    address: str, left: str, name: str | None, password: str | None
) -> None:
    environment = {"MLFLOW_TRACKING_URI": address}
    move_tracking_credentials(environment)
    assert environment.pop("MLFLOW_TRACKING_URI") == left
    assert environment.get("MLFLOW_TRACKING_USERNAME") == name
    assert environment.get("MLFLOW_TRACKING_PASSWORD") == password


def test_what_the_address_says_goes_before_the_variables() -> None:
    environment = {
        "MLFLOW_TRACKING_URI": "http://ada:new@host",
        "MLFLOW_TRACKING_USERNAME": "eve",
        "MLFLOW_TRACKING_PASSWORD": "old",
    }
    move_tracking_credentials(environment)
    assert environment["MLFLOW_TRACKING_USERNAME"] == "ada"
    assert environment["MLFLOW_TRACKING_PASSWORD"] == "new"


class _Refuser(BaseHTTPRequestHandler):
    """Refuses every request, and repeats in the refusal what it should not."""

    def do_GET(self) -> None:
        given = self.headers["Authorization"]
        self.server.seen.add(given)
        body = f"no entry with {given}".encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def refuser() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), _Refuser)
    server.seen = set()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


CONNECT = """
import sys
from pathlib import Path
from facegender.runtime.dvc_context import tracking_uri
from facegender.runtime.entry_points import run_command
def main():
    from facegender.tracking import connection
    connection.connect(Path(sys.argv[1]), tracking_uri(), required=True)
run_command(main)
"""


@pytest.mark.parametrize(
    ("login", "variables", "scheme", "given"),
    [
        ("ada:canary-p%40ss@", {}, "Basic", "ada:canary-p@ss"),
        (
            "",
            {"MLFLOW_TRACKING_USERNAME": "ada", "MLFLOW_TRACKING_PASSWORD": "canary-pass"},
            "Basic",
            "ada:canary-pass",
        ),
        ("", {"MLFLOW_TRACKING_TOKEN": "canary-token"}, "Bearer", "canary-token"),
    ],
)
def test_credentials_reach_the_server_and_not_the_error_that_it_returns(
    refuser: HTTPServer, tmp_path: Path, login: str, variables: dict, scheme: str, given: str
) -> None:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "MLFLOW_TRACKING_URI": f"http://{login}127.0.0.1:{refuser.server_port}",
        **variables,
    }
    done = run_python(CONNECT, tmp_path, env=environment, check=False)
    encoded = base64.b64encode(given.encode()).decode() if scheme == "Basic" else given
    assert refuser.seen == {f"{scheme} {encoded}"}
    assert done.returncode == 1
    printed = done.stdout + done.stderr
    assert f"no entry with {scheme} ***" in printed
    assert "Traceback" in printed
    assert "canary" not in printed
    assert encoded not in printed


def test_a_runs_user_is_not_the_name_that_logs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking.context.registry import resolve_tags

    from facegender.tracking.connection import user_tag

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "canary-ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary-password")
    assert resolve_tags()["mlflow.user"] == "canary-ada"
    assert resolve_tags(user_tag())["mlflow.user"] == getpass.getuser()
