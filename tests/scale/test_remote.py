"""DVC's data in S3 and in a cache that several users share, and objects that were damaged there."""

import grp
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlflow
import pytest
import yaml

from facegender.runtime.integrity import dvc_md5
from tests.conftest import run_command
from tests.leaks import holding
from tests.pipeline.conftest import Clone, copy_of
from tests.scale.servers import BUCKET, s3_server, stored

pytestmark = pytest.mark.scale

PREFIX = "facegender"
UP_TO_DATE = "Data and pipelines are up to date."
RUN = "models/run.json"


@dataclass(frozen=True)
class Remote:
    """A clone that has pushed its data to S3, and credentials that nothing may keep."""

    clone: Clone
    client: Any
    keys: dict[str, str]

    def key(self, path: str) -> str:
        """Return the key of the object of an output, or of a file in one."""
        md5 = dvc_md5(self.clone.root / path)
        return f"{PREFIX}/files/md5/{md5[:2]}/{md5[2:]}"

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def damage(self, path: str) -> tuple[str, bytes]:
        """Flip a bit of an object; return its key and what it was."""
        key = self.key(path)
        content = self.get(key)
        middle = len(content) // 2
        self.put(key, content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        return key, content

    def new_clone(self, folder: Path) -> Clone:
        """Clone from git: no data, no cache, no store."""
        clone = Clone(folder / "clone")
        self.clone.run("git", "clone", "--quiet", str(self.clone.root), str(clone.root))
        clone.run("git", "config", "user.name", "other")
        clone.run("git", "config", "user.email", "other@localhost")
        return clone


@pytest.fixture(scope="module")
def remote(reproduced: Clone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    mark = f"canary{uuid4().hex}"
    keys = {"AWS_ACCESS_KEY_ID": f"{mark}-id", "AWS_SECRET_ACCESS_KEY": f"{mark}-secret"}
    clone = copy_of(reproduced, tmp_path_factory.mktemp("remote"))
    with s3_server(keys) as (address, client):
        # As docs/scaling-storage.md has it.
        clone.run("dvc", "remote", "add", "--default", "team", f"s3://{BUCKET}/{PREFIX}")
        clone.run("dvc", "remote", "modify", "team", "endpointurl", address)
        clone.run("dvc", "remote", "modify", "team", "verify", "true")
        clone.commit("remote")
        clone.run("dvc", "push", **keys)
        yield Remote(clone, client, keys)


def outputs(clone: Clone) -> dict[str, str]:
    """Return the digests of what is in the work tree now, of all that dvc.lock names."""
    lock = yaml.safe_load((clone.root / "dvc.lock").read_text())
    return {
        out["path"]: dvc_md5(clone.root / out["path"])
        for stage in lock["stages"].values()
        for out in stage["outs"]
    }


def recorded(clone: Clone) -> dict[str, str]:
    lock = yaml.safe_load((clone.root / "dvc.lock").read_text())
    return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}


def test_a_clone_pulls_and_runs_nothing_and_goes_on_with_the_same_run(
    remote: Remote, tmp_path: Path
) -> None:
    clone = remote.new_clone(tmp_path)
    assert not (clone.root / ".dvc/cache").exists()
    # The other place for credentials, which git ignores.
    names = {"access_key_id": "AWS_ACCESS_KEY_ID", "secret_access_key": "AWS_SECRET_ACCESS_KEY"}
    for option, name in names.items():
        clone.run("dvc", "remote", "modify", "--local", "team", option, remote.keys[name])
    clone.run("dvc", "pull")
    assert UP_TO_DATE in clone.run("dvc", "repro").stdout
    assert (clone.root / RUN).read_text() == (remote.clone.root / RUN).read_text()
    assert outputs(clone) == outputs(remote.clone) == recorded(clone)
    assert not (clone.root / "mlflow.db").exists()

    store = f"sqlite:///{remote.clone.root / 'mlflow.db'}"
    evaluate = ("dvc", "repro", "--force", "--single-item", "evaluate")
    clone.run(*evaluate, MLFLOW_TRACKING_URI=store)
    mlflow.set_tracking_uri(store)
    (run,) = mlflow.search_runs(experiment_names=["facegender"], output_format="list")
    assert run.info.run_id == json.loads((clone.root / RUN).read_text())["run_id"]
    assert run.info.status == "FINISHED"
    assert clone.run("git", "status", "--short").stdout == ""

    # Nothing of either clone, and nothing in the bucket, holds a credential.
    words = list(remote.keys.values())
    assert holding(remote.clone.root, words) == []
    assert holding(clone.root, words) == [".dvc/config.local"]
    assert clone.run("git", "check-ignore", ".dvc/config.local").returncode == 0
    every = stored(remote.client)
    assert len(every) > 50
    assert [
        key for key, content in every.items() if any(w.encode() in content for w in words)
    ] == []


def test_a_damaged_object_is_named_and_made_again_and_the_remote_mended(
    remote: Remote, tmp_path: Path
) -> None:
    image = "data/processed/train/images.npy"
    key, whole = remote.damage(image)
    before = recorded(remote.clone)
    clone = remote.new_clone(tmp_path)
    pull = clone.run("dvc", "pull", check=False, **remote.keys)
    assert pull.returncode == 1
    assert "failed to pull data" in pull.stderr
    assert "data/processed" in pull.stderr
    assert not (clone.root / "data/processed").exists()
    repro = clone.run("dvc", "repro")
    assert clone.ran(repro.stdout) == ["preprocess"]
    assert outputs(clone) == recorded(clone) == before

    # DVC's push passes over it, because an object of that name exists.
    clone.run("dvc", "push", **remote.keys)
    assert remote.get(key) != whole
    found = remote.clone.run("facegender", "verify", "--remote", check=False, **remote.keys)
    assert found.returncode == 1
    assert f"{image}: damaged in the remote team" in found.stdout
    # Any clone's will do.
    clone.run("dvc", "push", **remote.keys)
    assert remote.get(key) == whole
    found = clone.run("facegender", "verify", "--remote", "team", **remote.keys)
    assert "match dvc.lock" in found.stdout


@pytest.mark.parametrize(
    "damaged", ["a flipped bit", pytest.param("another listing", marks=pytest.mark.campaign)]
)
def test_a_damaged_listing_is_noticed_and_made_again(
    remote: Remote, tmp_path: Path, damaged: str
) -> None:
    key, whole = remote.damage("data/splits")
    content = b"garbage" if damaged == "a flipped bit" else json.dumps(json.loads(whole)[1:])
    remote.put(key, content if isinstance(content, bytes) else content.encode())
    try:
        clone = remote.new_clone(tmp_path)
        pull = clone.run("dvc", "pull", check=False, **remote.keys)
        if damaged == "a flipped bit":
            assert pull.returncode != 0
            md5 = recorded(clone)["data/splits"]
            assert f"object {md5} is corrupted" in pull.stderr
        verify = clone.run("facegender", "verify", "--remote", check=False, **remote.keys)
        assert verify.returncode == 1
        assert "data/splits: damaged in " in verify.stdout
        clone.run("dvc", "pull", check=False, **remote.keys)
        repro = clone.run("dvc", "repro")
        assert clone.ran(repro.stdout) == ["split"]
        assert outputs(clone) == recorded(clone) == recorded(remote.clone)
    finally:
        remote.put(key, whole)


def test_a_remote_without_verify_cannot_have_damaged_images_trained_on(
    remote: Remote, tmp_path: Path
) -> None:
    image = "data/processed/train/images.npy"
    key, whole = remote.damage(image)
    try:
        clone = remote.new_clone(tmp_path)
        clone.run("dvc", "remote", "modify", "--local", "team", "verify", "false")
        clone.run("dvc", "pull", **remote.keys)
        # This is what DVC does by itself.
        assert UP_TO_DATE in clone.run("dvc", "repro").stdout
        assert outputs(clone) != recorded(clone)

        train = clone.run("dvc", "repro", "--force", "--single-item", "train", check=False)
        assert train.returncode != 0
        assert f"takes it for unchanged: {image}. Nothing is computed from it" in train.stderr
        found = clone.run("facegender", "verify", check=False)
        assert found.returncode == 1
        assert f"{image}: damaged in the work tree" in found.stdout
        assert f"{image}: damaged in DVC's cache" in found.stdout
        assert "`dvc remote modify team verify true`" in found.stderr
        # DVC removed the outputs of the stage before it ran, which shall not run again here.
        clone.run("git", "checkout", "--", "metrics")
        clone.run("dvc", "checkout", "models/model.keras", RUN)
        repro = clone.run("dvc", "repro")
        assert clone.ran(repro.stdout) == ["preprocess"]
        assert outputs(clone) == recorded(clone) == recorded(remote.clone)
    finally:
        remote.put(key, whole)


def test_two_clones_share_a_cache(reproduced: Clone, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    first = copy_of(reproduced, tmp_path / "first")
    second = Clone(tmp_path / "second")
    first.run("git", "clone", "--quiet", str(first.root), str(second.root))
    for clone in (first, second):
        share(clone, cache)
    shutil.rmtree(first.root / ".dvc/cache")
    shutil.copytree(reproduced.root / ".dvc/cache", cache, dirs_exist_ok=True)
    second.run("dvc", "checkout")
    assert UP_TO_DATE in second.run("dvc", "repro").stdout
    assert (second.root / RUN).is_symlink()
    assert not (second.root / ".dvc/cache").exists()
    assert outputs(second) == recorded(first)
    # The stages read through the links, and make the same.
    second.run("dvc", "repro", "--force", "--single-item", "preprocess")
    assert outputs(second) == recorded(first)


def share(clone: Clone, cache: Path) -> None:
    # As docs/scaling-storage.md has it.
    clone.run("dvc", "cache", "dir", "--local", str(cache))
    clone.run("dvc", "config", "--local", "cache.shared", "group")
    clone.run("dvc", "config", "--local", "cache.type", "reflink,symlink")


def test_users_of_a_group_write_to_the_same_cache() -> None:
    python = f"/usr/bin/python3.{sys.version_info.minor}"
    if os.geteuid() or not shutil.which("setpriv") or not Path(python).exists():
        pytest.skip(f"needs root, setpriv and {python}")
    group = grp.getgrnam("users").gr_gid
    users = [pwd.getpwnam(name).pw_uid for name in ("nobody", "daemon")]
    with tempfile.TemporaryDirectory() as name:
        # Not under pytest's folder, which is for one user alone.
        folder = Path(name)
        folder.chmod(0o755)
        cache, packages = folder / "cache", Path(pytest.__file__).parents[1]
        cache.mkdir()
        os.chown(cache, -1, group)
        cache.chmod(0o2775)
        for number, user in enumerate(users):
            work = folder / str(user)
            work.mkdir()
            os.chown(work, user, group)
            as_user = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", python]

            def run(*words: str, as_user: list[str] = as_user, work: Path = work) -> str:
                env = {
                    "PATH": "/usr/bin:/bin",
                    "HOME": str(work),
                    "PYTHONPATH": str(packages),
                    "DVC_SITE_CACHE_DIR": str(work / "site"),
                }
                return run_command(*as_user, *words, cwd=work, env=env, umask=0o022).stdout

            dvc = ("-m", "dvc")
            run(*dvc, "init", "--no-scm")
            for option, value in {
                "core.analytics": "false",
                "cache.dir": str(cache),
                "cache.shared": "group",
                "cache.type": "reflink,symlink",
            }.items():
                run(*dvc, "config", option, value)
            # The same for both, and enough of its own to fall into folders that the other made.
            (work / "data").mkdir()
            for file in range(300):
                (work / f"data/{file}").write_text(f"{file} {number if file % 2 else ''}")
            subprocess.run(["chown", "-R", f"{user}:{group}", str(work)], check=True)
            run(*dvc, "add", "data")
            assert run("-c", "print(open('data/0').read())") == "0 \n"
        owners = {path.stat().st_uid for path in cache.rglob("*") if path.is_file()}
        assert owners == set(users)
        folders = {oct(path.stat().st_mode & 0o7777) for path in cache.rglob("??")}
        files = {oct(path.stat().st_mode & 0o7777) for path in cache.rglob("*") if path.is_file()}
        assert folders == {"0o2775"}
        assert files == {"0o444"}
