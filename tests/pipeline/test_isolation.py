"""Experiments that run at the same time stay apart, whatever DVC's timing is."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from facegender.runtime.experiment_clone import experiments, take_snapshot
from facegender.runtime.git import committed_text, git
from facegender.runtime.sweep import grid_points, run_points
from tests.pipeline.conftest import Clone

pytestmark = pytest.mark.slow

STAGE = """
import json, os, sys, time, yaml
from pathlib import Path
params = yaml.safe_load(Path("params.yaml").read_text())
name = os.environ.get("DVC_EXP_NAME")
print("ran", name, params["x"], flush=True)
found = {"name": name, "root": os.environ.get("FACEGENDER_ROOT"), "changed": params["changed"]}
found |= {"x": params["x"], "files": sorted(path.name for path in Path("files").iterdir())}
Path("out.json").write_text(json.dumps(found))
sys.exit(params["x"] % 4 == 2)
"""
PIPELINE = {
    "stages": {
        "base": {"cmd": "echo base ran | tee base.txt", "deps": ["base.in"], "outs": ["base.txt"]},
        "one": {
            "cmd": "python stage.py",
            "deps": ["stage.py", "files", "base.txt"],
            "params": ["x", "changed"],
            "metrics": [{"out.json": {"cache": False}}],
        },
    }
}
# Delays where DVC's experiments of one clone take each other's: before and after each use of the
# stash.
DELAYS = """
import random, sys, time
if "exp" in sys.orig_argv:
    from pathlib import Path
    from scmrepo.git.stash import Stash
    def slow(call):
        def delayed(*args, **kwargs):
            Path(__file__).with_name("begun").touch()
            time.sleep(random.uniform(0, 0.5))
            result = call(*args, **kwargs)
            time.sleep(random.uniform(0, 0.5))
            return result
        return delayed
    for name in ("push", "pop", "drop", "apply"):
        setattr(Stash, name, slow(getattr(Stash, name)))
"""


@pytest.fixture
def repository(tmp_path: Path) -> Clone:
    """A small DVC repository with uncommitted changes: edited, new and deleted files."""
    clone = Clone(tmp_path / "repository")
    (clone.root / "files").mkdir(parents=True)
    (clone.root / "stage.py").write_text(STAGE)
    (clone.root / "base.in").touch()
    (clone.root / "dvc.yaml").write_text(yaml.safe_dump(PIPELINE))
    (clone.root / "params.yaml").write_text("changed: false\nx: 0\n")
    for name in ("kept", "deleted"):
        (clone.root / "files" / name).touch()
    clone.init()
    clone.run("dvc", "init", "--quiet")
    # Else each command of DVC starts two processes, one of which reports to its makers.
    quiet = "[core]\n    analytics = false\n    check_update = false\n"
    (clone.root / ".dvc" / "config").write_text(quiet)
    clone.run("dvc", "repro")
    clone.commit("start")
    (clone.root / "params.yaml").write_text("changed: true\nx: 0\n")
    (clone.root / "files" / "deleted").unlink()
    (clone.root / "files" / "new").touch()
    clone.run("git", "add", "files/new")
    return clone


def test_files_whose_time_alone_is_new_are_no_change(repository: Clone) -> None:
    repository.run("git", "reset", "--quiet", "--hard")
    os.utime(repository.root / "stage.py", (1, 1))
    snapshot = take_snapshot(repository.root)
    assert snapshot.changed == snapshot.head


def test_a_shallow_clone_can_sweep(repository: Clone, tmp_path: Path) -> None:
    repository.run("git", "commit", "--quiet", "--all", "--message", "second")
    shallow = Clone(tmp_path / "shallow")
    address = repository.root.as_uri()
    repository.run("git", "clone", "--quiet", "--depth", "1", address, str(shallow.root))
    for name in ("name", "email"):
        shallow.run("git", "config", f"user.{name}", "test")
    (shallow.root / "files" / "kept").unlink()
    (ended,) = run_points(shallow.root, grid_points({"x": [1]}, "sweep"), 1, shallow.environment())
    assert ended.commit is not None, ended.output
    found = json.loads(committed_text(shallow.root, "out.json", ended.commit))
    assert (found["x"], found["files"]) == (1, ["new"])
    assert experiments(shallow.root) == {"sweep-1"}


@pytest.mark.parametrize("count", [4, pytest.param(200, marks=pytest.mark.campaign)])
def test_experiments_are_not_mixed_up_by_delays(
    repository: Clone, tmp_path: Path, count: int
) -> None:
    (tmp_path / "delays").mkdir()
    (tmp_path / "delays" / "sitecustomize.py").write_text(DELAYS)
    environment = repository.environment(PYTHONPATH=str(tmp_path / "delays"))
    before = repository.run("git", "status", "--porcelain").stdout
    assert before == " D files/deleted\nA  files/new\n M params.yaml\n"
    points = grid_points({"x": list(range(1, count + 1))}, "sweep")
    stranger = subprocess.Popen(
        [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name", "stranger", "-S", "x=1000"],
        cwd=repository.root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # The stranger now hides the uncommitted changes.
    while not (tmp_path / "delays" / "begun").exists():
        assert stranger.poll() is None
        time.sleep(0.01)
    ended = list(run_points(repository.root, points, 4, environment))
    said = stranger.communicate()[0]
    assert stranger.returncode == 0, said
    assert "ran stranger 1000" in said

    assert sorted(one.point.name for one in ended) == sorted(point.name for point in points)
    for one in ended:
        x, name = one.point.values["x"], one.point.name
        ran = [line for line in one.output.splitlines() if line.startswith("ran ")]
        assert ran == [f"ran {name} {x}"], one.output
        assert "base ran" not in one.output  # its result is in the cache, which clones share
        assert (one.code != 0) == (one.commit is None) == (x % 4 == 2)
        if one.commit is not None:
            assert json.loads(committed_text(repository.root, "out.json", one.commit)) == {
                "name": name,
                "x": x,
                "root": str(repository.root),
                "changed": True,
                "files": ["kept", "new"],
            }
    good = {one.point.name for one in ended if one.commit is not None}
    assert experiments(repository.root) == {*good, "stranger"}
    # The repository is as it was, and nothing of the clones is left.
    assert repository.run("git", "status", "--porcelain").stdout == before
    assert list((repository.root / ".dvc" / "tmp").glob("sweep-*")) == []
    assert git(repository.root, "stash", "list") == ""
