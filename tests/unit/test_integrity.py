import os
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo

from facegender.cli.main import _run
from facegender.errors import UserError
from facegender.runtime import dvc_context, integrity
from facegender.runtime.integrity import (
    CACHE,
    WORK_TREE,
    check_inputs,
    dvc_md5,
    unverified_remotes,
    verify,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of one stage that makes a directory and a file, with a remote on disk."""
    root = tmp_path_factory.mktemp("made")
    make = "mkdir -p d/sub && printf 1 > d/sub/x && printf 2 > d/y && printf 3 > f"
    stages = {"make": {"cmd": make, "outs": ["d", "f"]}}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    Repo.init(str(root), no_scm=True).close()
    (root / ".dvc/config").write_text(
        """[core]\nno_scm = true\nanalytics = false\nremote = store\n"""
        """['remote "store"']\nurl = ../../store\n"""
    )
    dvc(root, "repro")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def dvc(root: Path, command: str) -> Any:
    """Run a command of DVC's that takes no arguments, and return what it found."""
    commands = {"repro": "reproduce"}
    # The commands of stages run in the working directory.
    with chdir(root), Repo(str(root)) as repo:
        return getattr(repo, commands.get(command, command))()


def damage(path: Path) -> None:
    """Change a file's bytes, and nothing that DVC looks at."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"!")
    path.chmod(before.st_mode & 0o777)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_md5_is_dvcs(root: Path) -> None:
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    recorded = {out["path"]: out["md5"] for out in lock["stages"]["make"]["outs"]}
    assert {path: dvc_md5(root / path) for path in ("d", "f")} == recorded


def test_what_dvc_takes_for_unchanged_is_refused_and_made_again(root: Path) -> None:
    lock, inputs = root / "dvc.lock", [root / "d", root / "f", root / "dvc.yaml", root / "absent"]
    check_inputs(lock, inputs)
    assert dvc(root, "status") == {}  # and it has noted so
    damage(root / "d" / "sub" / "x")
    assert dvc(root, "status") == {}
    with pytest.raises(UserError, match=r"takes it for unchanged: d/sub/x\. Nothing"):
        check_inputs(lock, inputs)
    check_inputs(lock, [root / "f"])

    *files, damaged = verify(root)
    assert files == [4, 0]
    assert [(item.path, item.location) for item in damaged] == [("d/sub/x", WORK_TREE)]
    assert dvc(root, "status") == {"make": [{"changed outs": {"d": "modified"}}]}
    dvc(root, "repro")
    assert (root / "d" / "sub" / "x").read_text() == "1"
    assert verify(root) == (4, 0, [])
    check_inputs(lock, inputs)


def test_of_a_large_output_only_what_is_read_is_hashed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = root / "dvc.lock"
    damage(root / "d" / "y")
    with pytest.raises(UserError, match=r"unchanged: d/y\."):
        check_inputs(lock, [root / "d" / "sub"])  # small, so all of it is
    monkeypatch.setattr(integrity, "_SMALL_BYTES", 1)
    check_inputs(lock, [root / "d" / "sub"])
    damage(root / "d" / "sub" / "x")
    with pytest.raises(UserError, match=r"unchanged: d/sub/x\."):
        check_inputs(lock, [root / "d" / "sub"])
    shutil.rmtree(root / ".dvc" / "cache")  # and with it the listing of what is in d
    with pytest.raises(UserError, match=r"unchanged: d\."):
        check_inputs(lock, [root / "d" / "sub"])


def test_what_is_not_here_is_not_called_right(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    name = dvc_md5(root / "f")
    (root / ".dvc/cache/files/md5" / name[:2] / name[2:]).unlink()
    assert verify(root) == (4, 0, [])
    (root / "f").unlink()
    assert verify(root) == (3, 1, [])
    monkeypatch.setenv("DVC_ROOT", str(root))
    assert _run(["verify"]) == 0
    out, err = capsys.readouterr()
    assert out == "3 files and directories match dvc.lock\n"
    assert "not checked: 1 files and directories are in neither" in err


def test_damaged_objects_are_removed_from_the_cache(root: Path) -> None:
    f, listing = dvc_md5(root / "f"), dvc_md5(root / "d")
    for name in (f, listing):
        damage(root / ".dvc/cache/files/md5" / name[:2] / name[2:])
    damage(root / "d" / "y")
    # The files of a directory without a listing are not known.
    with pytest.raises(UserError, match=r"unchanged: d\. Nothing"):
        check_inputs(root / "dvc.lock", [root / "d"])
    *_, damaged = verify(root)
    assert [(item.path, item.location, item.name) for item in damaged] == [
        ("d", WORK_TREE, f"{listing[:2]}/{listing[2:]}"),
        ("d", CACHE, f"{listing[:2]}/{listing[2:]}"),
        ("f", CACHE, f"{f[:2]}/{f[2:]}"),
    ]
    dvc(root, "repro")
    assert verify(root) == (4, 0, [])


def test_without_a_default_remote_one_must_be_named(root: Path) -> None:
    (root / ".dvc/config").write_text("[core]\nno_scm = true\nanalytics = false\n")
    with pytest.raises(UserError, match="no default remote"):
        verify(root, "")


def test_damaged_objects_are_removed_from_a_remote_and_pushed_again(root: Path) -> None:
    dvc(root, "push")
    name = dvc_md5(root / "d" / "y")
    stored = root.parent / "store/files/md5" / name[:2] / name[2:]
    stored.chmod(0o644)
    stored.write_text("!")
    assert verify(root) == (4, 0, [])
    for remote in ("", "store"):
        *_, damaged = verify(root, remote)
        assert [(item.path, item.location) for item in damaged] == [("d/y", "in the remote store")]
        assert not stored.exists()
        dvc(root, "push")
        assert stored.read_text() == "2"
        stored.chmod(0o644)
        stored.write_text("!")


def test_a_remote_that_does_not_verify_is_named(root: Path) -> None:
    assert unverified_remotes(root) == ["store"]
    with (root / ".dvc/config").open("a") as config:
        config.write("verify = true\n")
    assert unverified_remotes(root) == []


def test_without_a_remote_or_a_lock_it_says_what_to_do(root: Path) -> None:
    with pytest.raises(UserError, match="scaling-storage"):
        verify(root, "other")
    (root / "dvc.lock").unlink()
    check_inputs(root / "dvc.lock", [root / "d"])
    with pytest.raises(UserError, match="dvc repro"):
        verify(root)


def test_files_that_dvc_ignores_are_none_of_its_business(root: Path) -> None:
    (root / ".dvcignore").write_text("*.tmp\n")
    (root / "d" / "notes.tmp").write_text("mine")
    assert dvc(root, "status") == {}
    check_inputs(root / "dvc.lock", [root / "d"])


def test_a_stage_that_is_run_by_hand_may_read_anything(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(root / "f")
    monkeypatch.delenv("DVC_STAGE", raising=False)
    dvc_context.check_inputs(root / "dvc.lock", [root / "f"])
    monkeypatch.setenv("DVC_STAGE", "make")
    with pytest.raises(UserError, match="unchanged: f"):
        dvc_context.check_inputs(root / "dvc.lock", [root / "f"])
