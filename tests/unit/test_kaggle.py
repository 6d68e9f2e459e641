"""The Kaggle source against a server on this machine; the real `kaggle` package does the talking.

Tests in this process have an API key in the environment, which the client reads at each sign-in.
What it reads when it is imported, or only from files, is tested in other processes.
"""

import dataclasses
import io
import json
import logging
import os
import random
import socket
import subprocess
import sys
import traceback
import zipfile
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import Mock

import pytest

from facegender.data.sources import kaggle as source
from facegender.data.sources.archive import ArchiveLimits
from facegender.data.sources.kaggle import KaggleDownload, download_kaggle
from facegender.errors import UserError
from tests.conftest import free_port, read, run_python
from tests.kaggle_server import SIGNATURE, Fault, KaggleServer, kaggle_server

LIMITS = ArchiveLimits(max_total_bytes=10**9, max_ratio=100, max_files=10_000)
SLUG = "owner/faces"
KEY = "canary-key-of-ada"
BASIC = "Basic " + b64encode(f"ada:{KEY}".encode()).decode()


def pack(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


# The client writes pieces of 1 MiB: what is to break off half-way must have several.
FILES = {
    f"{split}/{folder}/{number}.jpg": random.Random(f"{split}{folder}{number}").randbytes(350_000)
    for split, folder in (("Training", "male"), ("dataset/test", "women"))
    for number in range(5)
}
FACES = pack(FILES)
OLD_FACES = pack({"men/1.jpg": b"old", "women/1.jpg": b"older"})
HALF = 2_000_000


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()


@dataclass
class Setting:
    """A server that has versions 1 and 2 of a dataset, and the directories of a download."""

    server: KaggleServer
    target: Path
    cache: Path
    naps: list[float]

    def download(self, slug: str = SLUG, version: int | None = 2, **options) -> KaggleDownload:
        limits = options.pop("limits", LIMITS)
        return download_kaggle(slug, version, self.target, limits, cache=self.cache, **options)

    def fail(self, *args, **options) -> str:
        """Download in vain, see that nothing half-written is left, and return the message."""
        with pytest.raises(UserError) as caught:
            self.download(*args, **options)
        assert not self.target.exists() or list(self.target.iterdir()) == []
        context = type(caught.value.__context__)
        assert not context.__module__.startswith(("requests", "urllib3", "kaggle"))
        message = str(caught.value)
        assert "\n" not in message
        whole = "".join(traceback.format_exception(caught.value))
        for canary in (KEY, BASIC.partition(" ")[2], SIGNATURE):
            assert canary not in whole
        return message

    def cached(self) -> dict[str, bytes]:
        return read(self.cache)


@pytest.fixture
def setting(tmp_path, monkeypatch) -> Iterator[Setting]:
    for name in list(os.environ):
        if name.startswith("KAGGLE_") or name.startswith("VERBOSE"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("KAGGLE_USERNAME", "ada")
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    with source._silence(), source._no_requests():
        from kaggle.api.kaggle_api_extended import KaggleApi
    monkeypatch.setattr(KaggleApi, "config", str(home / ".kaggle" / "kaggle.json"))
    naps: list[float] = []
    monkeypatch.setattr(source, "time", SimpleNamespace(sleep=naps.append))
    with kaggle_server({SLUG: {1: OLD_FACES, 2: FACES}}, keys={"ada": KEY}) as server:
        server.use(monkeypatch)
        yield Setting(server, tmp_path / "target", tmp_path / "cache", naps)


def test_a_version_is_downloaded_and_unpacked(setting, capfd):
    got = setting.download(version=1)
    assert got == KaggleDownload(SLUG, 1, digest(OLD_FACES))
    assert read(setting.target) == {"men/1.jpg": b"old", "women/1.jpg": b"older"}
    assert setting.cached() == {}
    assert capfd.readouterr() == ("", "")
    calls = [request.call for request in setting.server.requests]
    assert calls == ["DownloadDataset", "storage"]
    assert setting.server.requests[0].authorization == BASIC
    assert setting.server.requests[1].authorization is None


def test_the_newest_version_is_told(setting):
    assert setting.download(version=None) == KaggleDownload(SLUG, 2, digest(FACES))
    assert read(setting.target) == FILES
    asked = setting.server.calls("DownloadDataset")[0].body
    assert asked["datasetVersionNumber"] == 2


def test_a_server_that_tells_no_version_will_do(setting):
    setting.server.faults["GetDataset"] = [Fault(200, body=b"{}")]
    setting.server.faults["storage"] = [Fault(cut=HALF)] * 4
    setting.fail(version=None, attempts=1)
    setting.server.faults = {"GetDataset": [Fault(200, body=b"{}")]}
    assert setting.download(version=None) == KaggleDownload(SLUG, None, digest(FACES))
    assert read(setting.target) == FILES
    # Of what version would the half be? It is not used.
    assert [request.range for request in setting.server.calls("storage")] == [None, None]


@pytest.mark.parametrize(
    "slug", ["faces", "", "https://www.kaggle.com/datasets/owner/faces", "../faces", "a/b/3"]
)
def test_what_is_no_slug_is_refused_before_anything_is_sent(setting, slug):
    assert "dataset.slug" in setting.fail(slug)
    assert setting.server.requests == []


ADVICE = {
    401: "Create a token",
    403: "accept the terms",
    404: "Compare dataset.slug",
    418: "Check that https://www.kaggle.com/datasets/owner/faces opens",
}


@pytest.mark.parametrize("status", ADVICE)
@pytest.mark.parametrize("call", ["GetDataset", "DownloadDataset"])
def test_an_answer_that_will_stay_is_not_asked_for_again(setting, status, call):
    setting.server.faults[call] = [Fault(status)]
    message = setting.fail(version=None)
    assert str(status) in message
    assert ADVICE[status] in message
    assert len(setting.server.calls(call)) == 1
    assert setting.naps == []


def test_an_error_in_a_good_answer_is_an_error(setting):
    body = json.dumps({"code": 403, "message": f"no: {KEY}"}).encode()
    setting.server.faults["GetDataset"] = [Fault(200, body=body)]
    assert "(403)" in setting.fail(version=None)


def test_a_wrong_slug_and_a_wrong_version_are_not_found(setting):
    assert "the dataset owner/nobody (404)" in setting.fail("owner/nobody", None)
    assert "the dataset owner/faces, version 9 (404)" in setting.fail(version=9)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("call", ["GetDataset", "DownloadDataset", "storage"])
def test_a_passing_answer_is_asked_for_again(setting, status, call):
    setting.server.faults[call] = [Fault(status)] * 2
    setting.download(version=None, delay=1)
    assert read(setting.target) == FILES
    assert setting.naps == [1, 2]


@pytest.mark.parametrize(("status", "advice"), [(429, "too many"), (503, "Kaggle failed")])
def test_attempts_end(setting, status, advice):
    setting.server.faults["DownloadDataset"] = [Fault(status)] * 9
    message = setting.fail(attempts=3, delay=1)
    assert advice in message
    assert "run the same command again" in message
    assert len(setting.server.calls("DownloadDataset")) == 3
    assert setting.naps == [1, 2]


def test_the_server_says_how_long_to_wait(setting):
    setting.server.faults["DownloadDataset"] = [
        Fault(429, {"Retry-After": "17"}),
        Fault(503, {"Retry-After": "Wed, 01 Jan 2020 00:00:00 GMT"}),
        Fault(429, {"Retry-After": "soon"}),
    ]
    setting.download(delay=1)
    assert setting.naps == [17, 0, 4]


@pytest.mark.parametrize("status", [429, 503])
def test_nobody_waits_for_hours(setting, status):
    setting.server.faults["DownloadDataset"] = [Fault(status, {"Retry-After": "7200"})]
    assert "7200 seconds" in setting.fail()
    assert setting.naps == []


def test_a_refused_link_to_the_storage_is_replaced(setting):
    setting.server.faults["storage"] = [Fault(403)]
    setting.download()
    assert len(setting.server.calls("DownloadDataset")) == 2
    assert read(setting.target) == FILES


def test_no_server_is_a_broken_connection(setting, monkeypatch):
    from kagglesdk import kaggle_env

    endpoint = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, endpoint)
    message = setting.fail(attempts=2)
    assert "Check the network" in message
    assert len(setting.naps) == 1


def test_no_storage_is_a_broken_connection(setting):
    # `requests` puts this address into its message.
    place = f"http://127.0.0.1:{free_port()}/?X-Goog-Signature={SIGNATURE}"
    setting.server.faults["DownloadDataset"] = [Fault(headers={"Location": place})]
    assert "Check the network" in setting.fail(attempts=1)


@pytest.mark.parametrize("call", ["GetDataset", "DownloadDataset", "storage"])
def test_a_silent_server_is_a_broken_connection(setting, call):
    setting.server.faults[call] = [Fault(stall=9)]
    setting.download(version=None, timeout=0.3)
    assert read(setting.target) == FILES
    assert len(setting.naps) == 1


@pytest.mark.parametrize("fault", [Fault(cut=HALF), Fault(extra=7)])
def test_a_download_that_broke_off_is_resumed(setting, fault):
    setting.server.faults["storage"] = [fault]
    got = setting.download()
    assert got.archive_sha256 == digest(FACES)
    assert read(setting.target) == FILES
    assert setting.cached() == {}


def test_the_next_run_resumes(setting):
    setting.server.faults["storage"] = [Fault(cut=HALF)]
    assert "broke off" in setting.fail(attempts=1)
    kept = len(setting.cached()["owner--faces/2/faces.zip"])
    assert 0 < kept < len(FACES)
    assert setting.download() == KaggleDownload(SLUG, 2, digest(FACES))
    assert [request.range for request in setting.server.calls("storage")] == [
        None,
        None,  # asks what there is, and reads none of it
        f"bytes={kept}-",
    ]
    assert read(setting.target) == FILES
    assert setting.cached() == {}


def test_half_of_another_version_is_not_resumed(setting):
    setting.server.faults["storage"] = [Fault(cut=HALF)]
    setting.fail(version=2, attempts=1)
    assert setting.download(version=1) == KaggleDownload(SLUG, 1, digest(OLD_FACES))
    assert read(setting.target) == {"men/1.jpg": b"old", "women/1.jpg": b"older"}


def test_half_of_an_archive_that_has_changed_is_not_resumed(setting):
    setting.server.faults["storage"] = [Fault(cut=HALF)]
    setting.fail(attempts=1)
    other = pack({name: content[::-1] for name, content in FILES.items()})
    setting.server.datasets = {SLUG: {2: other}}
    assert setting.download() == KaggleDownload(SLUG, 2, digest(other))


def test_an_error_while_resuming_does_not_get_into_the_archive(setting):
    # The client takes whatever answers its second try for the archive, an error page included.
    setting.server.faults["storage"] = [Fault(cut=HALF), Fault(), Fault(503), Fault(503)]
    setting.fail(attempts=1)
    setting.download(attempts=2)
    assert read(setting.target) == FILES


def test_a_verbose_client_writes_what_it_gets(setting, monkeypatch, capfd):
    # VERBOSE makes it read the whole answer for printing, before anything is written.
    from kaggle.api.kaggle_api_extended import KaggleApi

    monkeypatch.setattr(KaggleApi, "args", ["--verbose"])
    setting.server.faults["storage"] = [Fault(cut=HALF)]
    setting.fail(attempts=1)
    assert len(setting.cached()["owner--faces/2/faces.zip"]) > 0
    assert capfd.readouterr() == ("", "")


def test_a_complete_archive_that_was_not_unpacked_is_not_fetched_again(setting):
    limits = dataclasses.replace(LIMITS, max_files=1)
    assert "max_files" in setting.fail(limits=limits)
    setting.server.faults["storage"] = [Fault(cut=0)]  # a second download would fail
    assert setting.download(attempts=1).archive_sha256 == digest(FACES)
    assert read(setting.target) == FILES


def test_a_complete_archive_of_another_version_is_not_taken(setting):
    # The client takes a file that is as new and as large for what it was asked for.
    setting.fail(version=2, limits=dataclasses.replace(LIMITS, max_files=1))
    assert setting.download(version=1).archive_sha256 == digest(OLD_FACES)


def test_an_archive_above_the_limit_is_not_downloaded(setting):
    message = setting.fail(limits=dataclasses.replace(LIMITS, max_total_bytes=len(FACES) - 1))
    assert f"has {len(FACES):,} bytes" in message
    assert "archive.max_gigabytes" in message
    assert list(setting.cache.rglob("*.zip*")) == []


def test_a_server_that_cannot_resume_starts_over(setting):
    setting.server.faults["storage"] = [Fault(cut=HALF, anonymous=True), Fault(anonymous=True)]
    assert setting.download().archive_sha256 == digest(FACES)
    assert read(setting.target) == FILES


@pytest.mark.parametrize("fault", [Fault(short=HALF), Fault(body=b"<html>Sign in</html>")])
def test_a_truncated_archive_is_fetched_once_more(setting, fault):
    setting.server.faults["storage"] = [fault]
    assert setting.download().archive_sha256 == digest(FACES)
    assert read(setting.target) == FILES


@pytest.mark.parametrize("fault", [Fault(short=HALF), Fault(body=b"<html>Sign in</html>")])
def test_an_archive_that_stays_truncated_is_an_error(setting, fault):
    setting.server.faults["storage"] = [fault] * 9
    message = setting.fail()
    assert "not a sound archive" in message
    assert "pin another version" in message
    assert len(setting.server.calls("storage")) == 2
    assert setting.cached() == {}


def test_a_hostile_archive_is_refused(setting, tmp_path):
    setting.server.datasets = {SLUG: {2: pack({"female/1.jpg": b"1", "../../evil.jpg": b"2"})}}
    assert "leads out" in setting.fail()
    assert not list(tmp_path.rglob("evil.jpg"))


def test_the_same_bytes_are_expected_of_the_same_version(setting):
    setting.download(expected_sha256=digest(FACES), expected_version=2)
    assert read(setting.target) == FILES


@pytest.mark.parametrize("expected_version", [None, 2])
@pytest.mark.parametrize("version", [None, 2])
def test_changed_bytes_of_the_same_version_are_an_error(setting, version, expected_version):
    options = {"expected_sha256": digest(OLD_FACES), "expected_version": expected_version}
    message = setting.fail(version=version, **options)
    assert "owner/faces, version 2" in message
    assert digest(OLD_FACES) in message
    assert digest(FACES) in message
    assert setting.cached() == {}


def test_a_newer_version_may_have_other_bytes(setting):
    got = setting.download(version=None, expected_sha256=digest(OLD_FACES), expected_version=1)
    assert got.version == 2


def test_ctrl_c_leaves_nothing_in_the_target(setting, monkeypatch):
    monkeypatch.setattr(zipfile.ZipFile, "open", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        setting.download()
    assert list(setting.target.iterdir()) == []


def test_a_full_disk_is_named(setting, monkeypatch):
    from kaggle.api.kaggle_api_extended import KaggleApi

    full = OSError(28, "No space left on device")
    monkeypatch.setattr(KaggleApi, "_write_resume_marker", Mock(side_effect=full))
    assert "No space left on device" in setting.fail()


def test_two_downloads_at_once_take_turns(setting):
    with source._locked(setting.cache):
        script = (
            "import logging, sys; from pathlib import Path\n"
            "from facegender.data.sources import kaggle\n"
            "logging.basicConfig(level='INFO', stream=sys.stdout, format='%(message)s')\n"
            "with kaggle._locked(Path(sys.argv[1])): print('locked', flush=True)\n"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", script, str(setting.cache)], stdout=subprocess.PIPE, text=True
        )
        assert other.stdout is not None
        told = other.stdout.readline()
        assert told.startswith(f"waiting for process {os.getpid()} on {socket.gethostname()}, ")
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.2)
    assert other.communicate()[0] == "locked\n"


@pytest.mark.parametrize("key", ["canary-kéy-€", "canary-key\nof-ada"])
def test_a_key_that_cannot_be_sent_is_explained(setting, monkeypatch, key):
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    monkeypatch.setenv("KAGGLE_API_TOKEN", key)
    message = setting.fail()
    assert "cannot be used" in message
    assert "canary" not in message


class Form(NamedTuple):
    """One way to give credentials: variables and files (below HOME), with {HOME} for its path."""

    variables: dict[str, str]
    files: dict[str, str]
    authorization: str


TOKEN = "canary-access-token"
REFRESH = "canary-refresh-token"
API_KEY = json.dumps({"username": "ada", "key": KEY})
OAUTH = {"refresh_token": REFRESH, "username": "ada", "scopes": ["resources.admin:*"]}
SOON_2100 = "2100-01-01T00:00:00+00:00"
LONG_AGO = "2020-01-01T00:00:00+00:00"
FORMS = {
    "token": Form({"KAGGLE_API_TOKEN": TOKEN}, {}, f"Bearer {TOKEN}"),
    "path of a token": Form(
        {"KAGGLE_API_TOKEN": "{HOME}/my-token"}, {"my-token": f"{TOKEN}\n"}, f"Bearer {TOKEN}"
    ),
    "access_token": Form({}, {".kaggle/access_token": f"{TOKEN}\n"}, f"Bearer {TOKEN}"),
    "access_token.txt": Form({}, {".kaggle/access_token.txt": TOKEN}, f"Bearer {TOKEN}"),
    "user and key": Form({"KAGGLE_USERNAME": "ada", "KAGGLE_KEY": KEY}, {}, BASIC),
    "kaggle.json": Form({}, {".kaggle/kaggle.json": API_KEY}, BASIC),
    "kaggle.json of XDG": Form({}, {".config/kaggle/kaggle.json": API_KEY}, BASIC),
    "KAGGLE_CONFIG_DIR": Form(
        {"KAGGLE_CONFIG_DIR": "{HOME}/elsewhere"}, {"elsewhere/kaggle.json": API_KEY}, BASIC
    ),
    "login": Form(
        {},
        {
            ".kaggle/credentials.json": json.dumps(
                OAUTH | {"access_token": TOKEN, "access_token_expiration": SOON_2100}
            )
        },
        f"Bearer {TOKEN}",
    ),
    "login that expired": Form(
        {},
        {
            ".kaggle/credentials.json": json.dumps(
                OAUTH | {"access_token": "canary-expired", "access_token_expiration": LONG_AGO}
            )
        },
        f"Bearer {TOKEN}",
    ),
}
CANARIES = ["canary", KEY, TOKEN, REFRESH, BASIC.partition(" ")[2]]

# Each slug fails in its own way; what a test sees of a failure is all that a user might.
SCRIPT = """
import json, logging, sys, traceback
from pathlib import Path
from facegender.data.sources.archive import ArchiveLimits
from facegender.data.sources.kaggle import download_kaggle
from facegender.errors import UserError
logging.basicConfig(level=logging.DEBUG)
home, outcomes = Path(sys.argv[1]), {}
limits = ArchiveLimits(max_total_bytes=10**9, max_ratio=100, max_files=100)
for slug in sys.argv[2:]:
    target = home / "target" / slug
    try:
        got = download_kaggle(
            slug, None, target, limits, cache=home / "cache", attempts=2, delay=0,
            timeout=5,
        )
        outcomes[slug] = repr(got)
    except UserError as error:
        outcomes[slug] = str(error)
        traceback.print_exc()
    files = sorted(path.name for path in target.rglob("*") if path.is_file())
    outcomes[slug] += f" {len(files)} files"
print(json.dumps(outcomes))
"""
FAILURES = {
    "ada/refused": ([Fault(401)] * 2, "(401)"),
    "ada/forbidden": ([Fault(403)] * 2, "(403)"),
    "ada/missing": ([Fault(404)] * 2, "(404)"),
    "ada/crowded": ([Fault(429)] * 2, "(429)"),
    "ada/troubled": ([Fault(503)] * 2, "(HTTP 503)"),
    "ada/broken": ([Fault(cut=1)] * 2, "broke off"),
}


class Outcome(NamedTuple):
    returncode: int
    stdout: str
    stderr: str

    def of(self, slug: str) -> str:
        return json.loads(self.stdout)[slug]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[..., Outcome]:
    """Return a function that downloads in a fresh interpreter with a home of its own."""

    def start(
        server: KaggleServer, slugs: list[str], variables: dict[str, str], files: dict[str, str]
    ) -> Outcome:
        home = tmp_path_factory.mktemp("home")
        for name, content in files.items():
            path = home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            path.chmod(0o600)
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("KAGGLE_", "XDG_"))
        }
        environment |= server.environment() | {"HOME": str(home), "VERBOSE": "true"}
        environment |= {
            name: value.replace("{HOME}", str(home)) for name, value in variables.items()
        }
        done = run_python(SCRIPT, home, *slugs, env=environment, check=False, timeout=60)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return start


@pytest.mark.parametrize("name", FORMS)
def test_each_form_of_credentials_arrives_and_shows_nowhere(run, name):
    form = FORMS[name]
    faults = {f"GetDataset {slug}": list(faults) for slug, (faults, _) in FAILURES.items()}
    with kaggle_server(
        {slug: {3: OLD_FACES} for slug in [SLUG, *FAILURES]},
        tokens={TOKEN},
        keys={"ada": KEY},
        refresh_tokens={REFRESH: TOKEN},
        faults=faults,
    ) as server:
        outcome = run(server, [SLUG, *FAILURES], form.variables, form.files)
    assert outcome.returncode == 0, outcome.stderr
    expected = KaggleDownload(SLUG, 3, digest(OLD_FACES))
    assert outcome.of(SLUG) == f"{expected!r} 2 files"
    for slug, (_, message) in FAILURES.items():
        assert message in outcome.of(slug)
        assert outcome.of(slug).endswith(" 0 files")
    for call in ("GetDataset", "DownloadDataset"):
        assert {request.authorization for request in server.calls(call)} == {form.authorization}
    assert {request.authorization for request in server.calls("storage")} == {None}
    for canary in [*CANARIES, SIGNATURE]:
        assert canary not in outcome.stdout
        assert canary not in outcome.stderr
    assert "Authentication required" not in outcome.stdout + outcome.stderr
    assert "UserError" in outcome.stderr  # the tracebacks were looked at, too


@pytest.mark.parametrize(
    ("variables", "files", "message"),
    [
        ({}, {}, "Kaggle credentials are missing."),
        ({"KAGGLE_USERNAME": "ada"}, {}, "credentials are missing"),
        ({}, {".kaggle/kaggle.json": f"{{broken {KEY}"}, "credentials are missing"),
        ({}, {".kaggle/kaggle.json": f'["{KEY}"]'}, "cannot be used"),
        ({}, {".kaggle/credentials.json": f'["{REFRESH}"]'}, "cannot be used"),
        (
            {},
            {".kaggle/credentials.json": json.dumps(OAUTH | {"refresh_token": "canary-revoked"})},
            "credentials are missing",
        ),
        ({"KAGGLE_API_TOKEN": "canary" * 50}, {}, "must be in a file"),
        ({"KAGGLE_API_TOKEN": "{HOME}"}, {}, "cannot be used"),
        ({"KAGGLE_API_TOKEN": "canary-old"}, {}, "it expired or was revoked"),
        (
            {"KAGGLE_API_TOKEN": "canary-old"},
            {".kaggle/kaggle.json": API_KEY},
            "An access token takes precedence over kaggle.json",
        ),
        ({"KAGGLE_USERNAME": "ada", "KAGGLE_KEY": "canary-wrong"}, {}, "(401)"),
    ],
)
def test_credentials_that_do_not_serve_are_explained(run, variables, files, message):
    with kaggle_server({SLUG: {3: OLD_FACES}}, tokens={TOKEN}, keys={"ada": KEY}) as server:
        outcome = run(server, [SLUG], variables, files)
    assert outcome.returncode == 0, outcome.stderr
    assert message in outcome.of(SLUG)
    assert "docs/own-data.md" in outcome.of(SLUG)
    assert outcome.of(SLUG).endswith(" 0 files")
    assert server.calls("DownloadDataset") == []
    for canary in CANARIES:
        assert canary not in outcome.stdout
        assert canary not in outcome.stderr


def test_the_client_signs_in_once_and_its_directory_is_for_the_user_alone(run, tmp_path_factory):
    # By itself it signs in when it is imported, too, without a timeout.
    with kaggle_server({SLUG: {3: OLD_FACES}}, tokens={TOKEN}) as server:
        outcome = run(server, [SLUG], {"KAGGLE_API_TOKEN": TOKEN}, {})
    assert outcome.of(SLUG).endswith(" 2 files")
    assert len(server.calls("IntrospectToken")) == 1
    found = tmp_path_factory.getbasetemp().glob("home*/.config/kaggle")
    made = [path for path in found if not any(path.iterdir())]  # not those with a test's file
    assert made
    assert {path.stat().st_mode & 0o077 for path in made} == {0}


def test_a_home_that_cannot_be_written_is_explained(run):
    with kaggle_server({SLUG: {3: OLD_FACES}}) as server:
        variables = {"KAGGLE_CONFIG_DIR": "{HOME}/file/kaggle"}
        outcome = run(server, [SLUG], variables, {"file": "in the way"})
    assert "Set KAGGLE_CONFIG_DIR" in outcome.of(SLUG)


def test_what_the_client_writes_is_for_the_user_alone(tmp_path):
    # An expired login is renewed, and the client writes the new token where the old one was.
    home = tmp_path / "home"
    (home / ".kaggle").mkdir(parents=True)
    login = home / ".kaggle" / "credentials.json"
    login.write_text(FORMS["login that expired"].files[".kaggle/credentials.json"])
    login.chmod(0o644)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("KAGGLE_", "XDG_"))}
    with kaggle_server(
        {SLUG: {3: OLD_FACES}}, tokens={TOKEN}, refresh_tokens={REFRESH: TOKEN}
    ) as server:
        environment |= server.environment() | {"HOME": str(home)}
        done = run_python("import os; os.umask(0o000)\n" + SCRIPT, home, SLUG, env=environment)
    assert " 2 files" in json.loads(done.stdout)[SLUG]
    assert TOKEN in login.read_text()
    assert login.stat().st_mode & 0o777 == 0o600
    # The images are no secrets: they have the permissions that the user's umask gives.
    (image,) = (home / "target" / SLUG / "men").iterdir()
    assert image.stat().st_mode & 0o777 == 0o666


def test_logs_tell_of_attempts_but_no_secrets(setting, caplog):
    setting.server.faults["storage"] = [Fault(503), Fault(cut=HALF)]
    with caplog.at_level(logging.DEBUG):
        setting.download(delay=1)
    assert "(HTTP 503). Attempt 2 of 4 in 1 seconds." in caplog.text
    assert "Attempt 3 of 4 in 2 seconds." in caplog.text
    for canary in (KEY, BASIC.partition(" ")[2], SIGNATURE):
        assert canary not in caplog.text
    assert logging.getLogger("urllib3").level == logging.NOTSET
