"""The real pipeline with a credential in every place where one may be: none is found afterwards."""

import shutil
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from tests.conftest import write_images
from tests.kaggle_server import SIGNATURE, KaggleServer, kaggle_server
from tests.leaks import contents, holding, is_pickle
from tests.pipeline.conftest import HOST, SMALL, Clone, copy_of, served

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Canaries:
    """Credentials that nothing else in the world contains, in the environment and in a home."""

    mark: str
    home: Path

    def write_files(self) -> None:
        for name, content in {
            ".kaggle/access_token": f"{self.mark}-file-token",
            ".kaggle/kaggle.json": f'{{"username": "{self.mark}-u", "key": "{self.mark}-k"}}',
            ".netrc": f"machine example.org login {self.mark}-l password {self.mark}-p",
        }.items():
            path = self.home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            path.chmod(0o600)

    @property
    def token(self) -> str:
        return f"{self.mark}-kaggle-token"

    def environment(self, server: KaggleServer, temporary: Path) -> dict[str, str]:
        names = (
            "KAGGLE_USERNAME KAGGLE_KEY MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD "
            "MLFLOW_TRACKING_TOKEN AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN"
        )
        proxy = server.url.replace("://", f"://{self.mark}-proxy-user:{self.mark}-proxy@")
        return {
            **{name: f"{self.mark}-{name.lower()}" for name in names.split()},
            **server.environment(),
            "KAGGLE_API_TOKEN": self.token,
            "VERBOSE": "true",  # has the client print what it sends, if one lets it
            "http_proxy": proxy,
            "HTTP_PROXY": proxy,
            # MLflow is asked directly.
            "no_proxy": "127.0.0.1",
            "NO_PROXY": "127.0.0.1",
            "HOME": str(self.home),
            "TMPDIR": str(temporary / "tmp"),
            "DVC_SITE_CACHE_DIR": str(temporary / "dvc"),
            # A server that is down is asked once.
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        }

    def address(self, plain: str) -> str:
        return plain.replace("://", f"://{self.mark}-user:{self.mark}-p%40ss@")

    @property
    def words(self) -> list[str]:
        """Return what must be found nowhere: the mark, which is in all, and headers made of it."""
        pairs = [
            f"{self.mark}-kaggle_username:{self.mark}-kaggle_key",
            f"{self.mark}-mlflow_tracking_username:{self.mark}-mlflow_tracking_password",
            f"{self.mark}-user:{self.mark}-p@ss",
            f"{self.mark}-proxy-user:{self.mark}-proxy",
        ]
        return [self.mark, *(b64encode(pair.encode()).decode() for pair in pairs)]


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param(("download",), id="download"),
        pytest.param((), marks=pytest.mark.campaign, id="all"),
    ],
)
def test_no_run_leaves_a_credential_anywhere(
    reproduced: Clone,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    stages: tuple[str, ...],
) -> None:
    """From Kaggle, and evaluated on a server; in the long form all stages between them as well."""
    canaries = Canaries(f"canary{uuid4().hex}", tmp_path / "home")
    canaries.write_files()
    (tmp_path / "tmp").mkdir()
    store = Clone(tmp_path / "store")
    store.root.mkdir()
    clone = copy_of(reproduced, tmp_path_factory.mktemp("clone"))
    remote = f"https://{canaries.mark}-git@example.org/faces.git"
    clone.run("git", "remote", "add", "origin", remote)
    clone.compose(*SMALL[2:], "dataset=kaggle", "dataset.slug=owner/faces")
    clone.commit("from Kaggle")
    evaluate = ("dvc", "repro", "--force", "--single-item", "evaluate")
    printed = []

    def run(*command: str, **env: str) -> str:
        done = clone.run(*command, check=False, **environment, **env)
        printed.append(done.stdout + done.stderr)
        return f"exit {done.returncode}\n{printed[-1]}"

    faces = shutil.make_archive(str(tmp_path / "faces"), "zip", write_images(tmp_path / "faces"))
    versions = {"owner/faces": {3: Path(faces).read_bytes()}}
    with kaggle_server(versions, tokens={canaries.token}) as server:
        environment = canaries.environment(server, tmp_path)
        with served(store, ("mlflow", "ui"), tmp_path / "store.log") as port:
            address = canaries.address(f"http://{HOST}:{port}")
            from_kaggle = run("dvc", "repro", *stages, MLFLOW_TRACKING_URI=address)
            assert from_kaggle.startswith("exit 0")
            if stages:
                assert run(*evaluate, MLFLOW_TRACKING_URI=address).startswith("exit 0")
        # The credentials were used, and MLflow has the run.
        sent = {request.authorization for request in server.calls("DownloadDataset")}
        assert sent == {f"Bearer {canaries.token}"}
        (there,) = store.runs()
        assert there.data.tags["mlflow.source.git.repoURL"] == "https://example.org/faces.git"

        assert run(*evaluate).startswith("exit 0")  # into the repository's own store
        down = run(*evaluate, MLFLOW_TRACKING_URI=address)
        assert down.startswith("exit 0")
        assert "does not answer" in down
        clone.compose(*SMALL[2:], "dataset=kaggle", "dataset.slug=owner/gone")
        gone = run("dvc", "repro", "download")
        assert "Kaggle does not have the dataset owner/gone" in gone

    words = [*canaries.words, SIGNATURE]
    assert [word for word in words if word in "".join(printed)] == []
    # Of all that lies there, only git's own configuration holds what the user wrote into it, and
    # the home its files. The clone has the tests' own file with the signature's text.
    assert holding(tmp_path, canaries.words) == [
        "home/.kaggle/access_token",
        "home/.kaggle/kaggle.json",
        "home/.netrc",
    ]
    assert holding(clone.root, canaries.words) == [".git/config"]
    for folder in ("mlruns", "metrics", "models", "data", ".dvc"):
        assert holding(clone.root / folder, [SIGNATURE]) == []


def test_no_pickle_is_logged_or_kept(reproduced: Clone) -> None:
    places = ("mlruns", "models", "data", "metrics", ".dvc/cache")
    found = {place: list(contents(reproduced.root / place)) for place in places}
    assert {place for place, files in found.items() if not files} == set()
    # The search went inside: the logged model's files, and the members of the Keras archive.
    names = {name for name, _ in found["mlruns"]}
    for ending in ("/MLmodel", "/artifacts/model.tflite", "/model.keras/config.json"):
        assert [name for name in names if name.endswith(ending)]
    assert [
        f"{place}/{name}"
        for place, files in found.items()
        for name, content in files
        if is_pickle(name, content)
    ] == []
