"""GitHub's workflow and .ci/run, which do the same elsewhere, agree with the Makefile."""

import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from tests.compose import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
LOCAL = ROOT / ".ci" / "run"


@pytest.fixture
def workflow() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text())


def made_by(script: str) -> set[str]:
    """Return the targets of every `make` that a script calls."""
    calls = re.findall(r"(?:^|[;&|])[ \t]*make[ \t]+([^;&|#\n]+)", script, re.MULTILINE)
    words = (word for call in calls for word in call.split())
    return {word for word in words if not word.startswith("-") and "=" not in word}


def made_by_workflow(workflow: dict[str, Any]) -> set[str]:
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    return set().union(*(made_by(step.get("run", "")) for step in steps))


def test_calls_of_make_are_found() -> None:
    script = (
        "set -e\n# make coffee\nmake a\n  make -j2 b X=1 c # d\ncd x && make e; make f\nremake g"
    )
    assert made_by(script) == {"a", "b", "c", "e", "f"}


def test_ci_makes_targets_that_exist(workflow: dict[str, Any]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, re.MULTILINE))
    assert made_by_workflow(workflow) - targets == set()
    assert made_by(LOCAL.read_text()) - targets == set()


def test_both_ways_to_run_ci_make_the_same(workflow: dict[str, Any]) -> None:
    made = made_by_workflow(workflow)
    assert {"lint", "repro", "test"} <= made
    assert made == made_by(LOCAL.read_text())


def test_the_workflow_may_only_read(workflow: dict[str, Any]) -> None:
    # A job without permissions of its own has the workflow's.
    given = [
        workflow["permissions"],
        *(job.get("permissions") for job in workflow["jobs"].values()),
    ]
    assert [one for one in given if one not in ({"contents": "read"}, {}, None)] == []
    assert workflow["permissions"] is not None


def test_actionlint_finds_nothing() -> None:
    if shutil.which("actionlint") is None:
        pytest.skip("needs actionlint on PATH")
    done = subprocess.run(
        ["actionlint", str(WORKFLOW)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
