"""Results read from the work tree and from git, the commit to compare with, `facegender gate`."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import yaml
from dvc.utils.serialize import dump_yaml, load_yaml

from facegender.cli.main import _run
from facegender.errors import UserError
from facegender.evaluation.metrics import classification_metrics
from facegender.gate.compare import commit_of, default_baseline, parse_results, read_results
from facegender.gate.freshness import edited_results, why_stale
from facegender.runtime.git import checked_git, git
from facegender.runtime.integrity import dvc_md5
from tests.conftest import FACEGENDER, commit_all, fill, init_repository, run_command
from tests.unit.conftest import ABSENT, edit_params
from tools.compose_params import ROOT

FILES = (
    ".dvc/.gitignore",
    ".dvc/config",
    "dvc.yaml",
    "metrics/predictions.csv",
    "metrics/test.json",
    "params.yaml",
)


class Project:
    """A repository with the sample's results, where they can be made worse."""

    def __init__(self, root: Path) -> None:
        self.root = root
        fill(root, {name: (ROOT / name).read_bytes() for name in FILES})
        self.lock()
        init_repository(root)
        self.first = self.commit("first")

    def git(self, *arguments: str) -> str:
        return checked_git(self.root, *arguments)

    def commit(self, message: str) -> str:
        return commit_all(self.root, message)

    def lock(self) -> None:
        """Record results and parameters as DVC does when `dvc repro` ends."""
        params = yaml.safe_load((self.root / "params.yaml").read_text())
        entry = {
            "deps": [{"path": "dvc.yaml", "md5": dvc_md5(self.root / "dvc.yaml")}],
            "params": {"params.yaml": {"evaluate": params["evaluate"], "train": params["train"]}},
            "outs": [
                {"path": name, "md5": dvc_md5(self.root / name)}
                for name in FILES
                if name.startswith("metrics/")
            ],
        }
        (self.root / "dvc.lock").write_text(yaml.safe_dump({"stages": {"evaluate": entry}}))

    def set(self, **changes: object) -> None:
        """Change parameters, as `edit_params` does, and run the pipeline with them."""
        edit_params(self.root, **changes)
        self.lock()

    def spoil(self, count: int) -> None:
        """Have the first images that are predicted rightly be predicted wrongly."""
        path = self.root / "metrics" / "predictions.csv"
        table = pd.read_csv(path)
        right = table.index[table["label"] == table["predicted"]][:count]
        table.loc[right, "predicted"] = 1 - table.loc[right, "label"]
        table.loc[right, "probability"] = 0.2 + 0.6 * table.loc[right, "predicted"]
        table.to_csv(path, index=False)
        metrics = classification_metrics(
            table["label"].to_numpy(), table["probability"].to_numpy(), threshold=0.5
        )
        (self.root / "metrics" / "test.json").write_text(json.dumps(metrics))
        self.lock()

    def baseline(self) -> tuple[str, str]:
        return default_baseline(self.root, read_results(self.root))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    made = Project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return made


# The baseline.


def test_a_branch_is_compared_with_its_merge_base(project: Project) -> None:
    project.git("switch", "--quiet", "--create", "branch")
    project.spoil(1)
    project.commit("on the branch")
    assert project.baseline() == (project.first, "the merge base with main")
    project.git("switch", "--quiet", "main")
    later = project.commit("on main")
    project.git("switch", "--quiet", "branch")
    assert project.baseline()[0] == project.first
    # The nearer one of the local and the fetched main.
    project.git("merge", "--quiet", "-m", "merge", "main")
    project.git("branch", "--quiet", "--force", "main", project.first)
    project.git("update-ref", "refs/remotes/origin/main", later)
    assert project.baseline()[0] == later


def test_on_main_an_experiment_is_compared_with_head_and_a_commit_with_the_last(
    project: Project,
) -> None:
    project.spoil(1)
    assert project.baseline() == (project.first, "HEAD")
    project.commit("worse")
    assert project.baseline() == (project.first, "the commit before HEAD")
    second = project.git("rev-parse", "HEAD")
    # Other probabilities are another model, even if it labels all images alike.
    path = project.root / "metrics" / "predictions.csv"
    table = pd.read_csv(path)
    table.assign(probability=0.5 + 0.9 * (table["probability"] - 0.5)).to_csv(path, index=False)
    assert project.baseline() == (second, "HEAD")


def test_results_of_head_without_predictions_are_told_by_their_metrics(project: Project) -> None:
    second = project.commit("the same results")
    (project.root / "metrics/predictions.csv").unlink()
    assert project.baseline() == (project.first, "the commit before HEAD")
    path = project.root / "metrics/test.json"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | {"n": 1}))
    assert project.baseline() == (second, "HEAD")
    path.write_text("{")
    third = project.commit("not readable")
    path.write_text(text)
    assert project.baseline() == (third, "HEAD")


def test_without_a_commit_before_or_a_main_it_says_what_to_do(project: Project) -> None:
    with pytest.raises(UserError, match=r"no commit is before it.*--baseline"):
        project.baseline()
    project.git("branch", "--quiet", "--move", "main", "other")
    with pytest.raises(UserError, match=r"git fetch origin main.*--baseline"):
        project.baseline()


def test_a_merge_never_mixes_two_results(project: Project) -> None:
    shutil.copy(ROOT / ".gitattributes", project.root)
    project.commit("attributes")
    kept = {}
    for branch, count in (("one", 1), ("two", 2)):
        project.git("switch", "--quiet", "--create", branch, "main")
        project.spoil(count)
        lines = json.dumps(json.loads((project.root / "metrics/test.json").read_text()), indent=2)
        # Line by line, git would merge these in silence.
        metric = {"one": "n", "two": "f1_ci"}[branch]
        (project.root / "metrics/test.json").write_text(lines.replace(metric, f"{metric}_{branch}"))
        project.lock()
        project.commit(branch)
        kept = {name: (project.root / name).read_bytes() for name in ("dvc.lock", *FILES)}
    with pytest.raises(UserError):
        project.git("merge", "one")
    assert {name: (project.root / name).read_bytes() for name in kept} == kept
    unmerged = project.git("diff", "--name-only", "--diff-filter=U").splitlines()
    assert unmerged == ["dvc.lock", "metrics/predictions.csv", "metrics/test.json"]


def test_git_for_windows_does_not_make_results_stale(project: Project) -> None:
    # Its default, in a checkout that a dev container mounts.
    project.git("config", "core.autocrlf", "true")
    shutil.copy(ROOT / ".gitattributes", project.root)
    names = ("dvc.lock", *FILES)
    kept = {name: (project.root / name).read_bytes() for name in names}
    project.commit("attributes")
    for name in names:
        (project.root / name).unlink()
    project.git("checkout", "--", ".")
    assert {name: (project.root / name).read_bytes() for name in names} == kept


def test_the_advice_restores_a_file_in_the_middle_of_a_merge(project: Project) -> None:
    for branch, line in (("one", "[1"), ("two", "[2")):
        project.git("switch", "--quiet", "--create", branch, "main")
        (project.root / "dvc.lock").write_text(f"stages: {line}]\n")
        project.commit(branch)
    with pytest.raises(UserError):
        project.git("merge", "one")
    with pytest.raises(UserError, match=r"Cannot read dvc\.lock") as caught:
        edited_results(project.root, None, None)
    advice = str(caught.value).split("`git ")[1].split("`")[0]
    project.git(*advice.split())
    assert (project.root / "dvc.lock").read_text() == "stages: [2]\n"


# The command.


def gate(*options: str) -> int:
    return _run(["gate", *options])


def test_each_verdict_has_its_exit_code(
    project: Project, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gate("--baseline", "HEAD") == 0
    assert capsys.readouterr().out.startswith("gate: pass\n")
    assert gate() == 2
    assert "no commit is before it" in capsys.readouterr().out
    project.spoil(40)
    assert gate() == 1
    out = capsys.readouterr().out
    assert out.startswith("gate: fail\n")
    assert f"compared with HEAD ({project.first[:10]}) image by image" in out
    # From a subfolder, as others do.
    monkeypatch.chdir(project.root / "metrics")
    assert gate("--format", "markdown") == 1
    assert capsys.readouterr().out.startswith("## Gate: fail\n")
    assert gate("--format", "json") == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "fail"


def test_a_baseline_can_be_a_tag_and_must_exist(
    project: Project, capsys: pytest.CaptureFixture
) -> None:
    project.git("tag", "v1")
    project.spoil(1)
    project.commit("worse")
    assert gate("--baseline", "v1") == 0
    assert f"v1 ({project.first[:10]})" in capsys.readouterr().out
    assert gate("--baseline", "v2") == 2
    assert "unknown Git revision 'v2'" in capsys.readouterr().out


LOOSER = {
    "floors": {"gate__floors": {}},
    "floor": {"gate__floors__accuracy__at_least": 0.5},
    "direction": {"gate__floors__accuracy": {"at_most": 1}},
    "tolerance": {"gate__max_drop__accuracy": 0.5},
    "significance": {"gate__significance": 1e-9},
    "groups": {"evaluate__min_group_size": 10_000},
    "test": {"gate__test": "difference"},
    "evidence": {"gate__without_evidence": "pass"},
    "all": {
        "gate__floors": {},
        "gate__max_drop": dict.fromkeys(("accuracy", "recall", "group", "f1", "ece"), 0.99),
    },
}


@pytest.mark.parametrize("changes", LOOSER.values(), ids=LOOSER)
def test_a_candidate_cannot_loosen_its_own_rules(
    project: Project, capsys: pytest.CaptureFixture, changes: dict
) -> None:
    project.set(gate__test="noninferiority", gate__without_evidence="refuse")
    project.commit("strict rules")
    project.spoil(72)
    assert gate("--format", "json") == 1
    before = json.loads(capsys.readouterr().out)
    project.set(**changes)
    assert gate("--format", "json") == 1
    after = json.loads(capsys.readouterr().out)
    (note,) = after["notes"]
    assert note.startswith("the work tree loosens the gate's rules: ")
    assert "--accept-rule-change" in note
    assert sorted(after["failures"]) == sorted(before["failures"])
    assert after["not_shown"] == before["not_shown"] != []
    assert after["groups"] == before["groups"]


def test_a_rule_that_the_baseline_leaves_at_its_default_cannot_be_loosened(
    project: Project, capsys: pytest.CaptureFixture
) -> None:
    project.set(gate__without_evidence=ABSENT)
    project.commit("without the rule")
    project.spoil(5)
    assert gate("--baseline", "HEAD") == 3
    project.set(gate__without_evidence="pass")
    assert gate("--baseline", "HEAD") == 3
    assert "gate.without_evidence from refuse_drops to pass" in capsys.readouterr().out


def test_too_few_images_are_no_pass_if_the_rules_say_so(
    project: Project, capsys: pytest.CaptureFixture
) -> None:
    assert gate("--baseline", "HEAD") == 0
    assert gate("--baseline", "HEAD", "--require-evidence") == 3
    project.spoil(5)
    capsys.readouterr()
    assert gate("--baseline", "HEAD") == 3
    assert "- accuracy fell by more than the tolerance, and 360 images" in capsys.readouterr().out
    project.git("checkout", "--quiet", "--", ".")
    project.set(gate__without_evidence="refuse")
    capsys.readouterr()
    assert gate("--baseline", "HEAD") == 3
    out = capsys.readouterr().out
    assert out.startswith("gate: not enough evidence\n")
    assert "stricter than the baseline's: gate.without_evidence from refuse_drops to refuse" in out
    assert "the tolerance is 0.01, which takes " in out


def drift(project: Project, reference: str | None) -> list[int]:
    """Lose three of 360 images at each commit; return each step's exit code."""
    project.set(gate__floors={}, gate__reference=reference)
    project.git("tag", "release")
    project.commit("rules")
    codes = []
    for step in range(4):
        project.spoil(3)
        codes.append(gate("--baseline", "HEAD"))
        project.commit(f"step {step}")
    return codes


def test_small_drops_that_pass_one_by_one_fail_as_a_sum(
    project: Project, capsys: pytest.CaptureFixture
) -> None:
    # After two steps the sum is beyond the tolerance, and too few images to tell it from chance.
    assert drift(project, "release") == [0, 3, 1, 1]
    capsys.readouterr()
    assert gate("--baseline", "HEAD~1", "--format", "json") == 1
    report = json.loads(capsys.readouterr().out)
    rows = {row["metric"]: row for row in report["comparisons"]}
    fixed = {row["metric"]: row for row in report["reference"]["comparisons"]}
    assert rows["accuracy"]["difference"] == pytest.approx(-3 / 360)
    assert fixed["accuracy"]["difference"] == pytest.approx(-12 / 360)
    assert (rows["accuracy"]["verdict"], fixed["accuracy"]["verdict"]) == ("pass", "fail")
    name = f"release ({project.first[:10]})"
    assert report["failures"][0].startswith(f"against the reference {name}: accuracy went from ")
    for form in ("text", "markdown"):
        assert gate("--baseline", "HEAD~1", "--format", form) == 1
        out = capsys.readouterr().out
        assert f"The same results, compared with the reference {name} image by image" in out
        assert out.count("-0.0333") == out.count("-0.0083") == 1


def test_without_a_reference_small_drops_pass(project: Project) -> None:
    assert drift(project, None) == [0, 0, 0, 0]


@pytest.mark.parametrize("later", [None, "HEAD"])
def test_a_candidate_cannot_forget_the_reference(
    project: Project, capsys: pytest.CaptureFixture, later: str | None
) -> None:
    drift(project, "release")
    capsys.readouterr()
    edit_params(project.root, gate__reference=later)
    assert gate("--baseline", "HEAD~1") == 1
    assert "loosens the gate's rules: gate.reference " in capsys.readouterr().out
    assert gate("--baseline", "HEAD~1", "--accept-rule-change") == 0


@pytest.mark.parametrize("fault", ["unknown", "images", "edited"])
def test_a_reference_that_cannot_be_compared_gets_no_verdict(
    project: Project, capsys: pytest.CaptureFixture, fault: str
) -> None:
    if fault != "unknown":
        path = project.root / "metrics" / "predictions.csv"
        text = path.read_text()
        table = pd.read_csv(path)
        table.loc[0, "sha256"] = "0" * 64
        table.to_csv(path, index=False)
        if fault == "images":
            project.lock()
        project.git("tag", "other", project.commit("another test set"))
        path.write_text(text)
    project.set(gate__reference="other")
    assert gate("--baseline", project.first) == 2
    out = capsys.readouterr().out
    said = {
        "unknown": "unknown Git revision 'other'",
        "images": "the test sets differ: 360 images in the work tree, 360 in other",
        "edited": "is not what its dvc.lock records",
    }[fault]
    assert "not judged against gate.reference other: " in out
    assert said in out
    assert "set gate.reference to a commit with results on these test images" in out


def test_a_looser_rule_that_is_accepted_applies_and_is_reported(
    project: Project, capsys: pytest.CaptureFixture
) -> None:
    project.spoil(72)
    project.set(**LOOSER["all"])
    assert gate("--accept-rule-change") == 0
    out = capsys.readouterr().out
    assert "accepted: looser rules than the baseline's: " in out
    assert "gate.floors.accuracy.at_least 0.93 is gone" in out
    assert "gate.max_drop.accuracy from 0.01 to 0.99" in out


def test_a_stricter_rule_applies_at_once(project: Project, capsys: pytest.CaptureFixture) -> None:
    project.set(gate__floors__accuracy__at_least=0.99, gate__floors__brier={"at_most": 1})
    assert gate("--baseline", "HEAD") == 1
    out = capsys.readouterr().out
    accuracy = json.loads((project.root / "metrics" / "test.json").read_text())["accuracy"]
    assert f"accuracy is {accuracy:.4f}; it must be at least 0.99" in out
    assert (
        "stricter than the baseline's: gate.floors.accuracy.at_least from 0.93 to 0.99, "
        "gate.floors.brier.at_most 1.0 is new"
    ) in out


def test_rules_of_the_baseline_that_cannot_be_read(
    project: Project, capsys: pytest.CaptureFixture
) -> None:
    text = (project.root / "params.yaml").read_text()
    # A baseline from before there was a gate: the candidate's rules apply.
    project.set(gate=ABSENT)
    project.commit("no gate")
    (project.root / "params.yaml").write_text(text)
    assert gate("--baseline", "HEAD") == 0
    assert capsys.readouterr().out.startswith("gate: pass\n")
    for content in ({"gate__significance": "high"}, {"gate__max_drop__accuracy": 7}):
        project.set(**content)
        project.commit("invalid")
        (project.root / "params.yaml").write_text(text)
        assert gate("--baseline", "HEAD") == (2 if "high" in content.values() else 0)
        capsys.readouterr()


def test_corrected_labels_are_compared_paired_without_the_baselines_model(
    project: Project, capsys: pytest.CaptureFixture
) -> None:
    path = project.root / "metrics" / "predictions.csv"
    table = pd.read_csv(path)
    wrong = table.index[table["label"] != table["predicted"]]
    right = len(table) - len(wrong)
    table.loc[wrong[:3], "label"] = table.loc[wrong[:3], "predicted"]
    # In another order, because images are told by their digests.
    table[::-1].to_csv(path, index=False)
    project.spoil(8)
    assert gate("--baseline", "HEAD", "--format", "json") == 2
    (reason,) = json.loads(capsys.readouterr().out)["undecided"]
    assert reason.startswith("3 of 360 images in both test sets have another label; --accept-data")
    assert gate("--baseline", "HEAD", "--format", "json", "--accept-data-change") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["paired"]
    (accuracy,) = (row for row in report["comparisons"] if row["metric"] == "accuracy")
    # On three images the baseline's answer is the new label.
    assert (accuracy["old"], accuracy["new"]) == ((right + 3) / 360, (right - 5) / 360)
    assert accuracy["p"] == pytest.approx(3 * 2 * 0.5**8)
    assert any(note.startswith("accepted: 3 of 360 images") for note in report["notes"])


def test_the_page_accepts_no_more_than_the_gate(
    project: Project, capsys: pytest.CaptureFixture
) -> None:
    path = project.root / "metrics" / "predictions.csv"
    table = pd.read_csv(path)
    table.loc[:2, "label"] = 1 - table.loc[:2, "label"]
    table.to_csv(path, index=False)
    project.spoil(0)
    (project.root / "requirements.lock").touch()
    for flags in ([], ["--accept-data-change"]):
        gate("--baseline", "HEAD", "--format", "json", *flags)
        verdict = json.loads(capsys.readouterr().out)["verdict"]
        assert _run(["report", "--baseline", "HEAD", *flags]) == 0
        assert f"report.html: {verdict}, compared with HEAD" in capsys.readouterr().out
        page = (project.root / "report.html").read_text()
        assert f">{verdict}</strong>" in page
        assert ("accepted: 3 of 360" in page) == bool(flags)
    for output in ("metrics", "none/page.html"):
        with pytest.raises(UserError, match=f"Cannot write {output}"):
            _run(["report", "--baseline", "HEAD", "--output", output])


# Results that are not those of the work tree.


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("params.yaml", "threshold: 0.5", "threshold: 0.6", "params.yaml: evaluate"),
        ("metrics/test.json", "{", " {", "metrics/test.json (edited)"),
        ("dvc.yaml", "vars:", "vars: ", "dvc.yaml"),
        ("dvc.lock", "metrics/test.json", "metrics/other.json", "test.json (not in dvc.lock)"),
    ],
)
def test_stale_results_get_no_verdict(
    project: Project, capsys: pytest.CaptureFixture, file: str, old: str, new: str, says: str
) -> None:
    path = project.root / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    assert gate("--baseline", "HEAD", "--format", "json") == 2
    (reason,) = json.loads(capsys.readouterr().out)["undecided"]
    assert reason.startswith("the results are stale: ")
    assert says in reason
    if file == "params.yaml":
        project.lock()
        assert gate("--baseline", "HEAD") == 0


def test_results_that_are_missing_get_no_verdict(
    project: Project, capsys: pytest.CaptureFixture
) -> None:
    (project.root / "metrics/predictions.csv").unlink()
    assert gate("--baseline", "HEAD", "--format", "json") == 2
    reasons = json.loads(capsys.readouterr().out)["undecided"]
    assert "there are no predictions of the work tree" in reasons
    (project.root / "metrics/test.json").unlink()
    assert gate() == 2
    assert capsys.readouterr().err.startswith(
        "error: There are no test metrics in the work tree: run"
    )


def test_code_and_weights_that_a_stage_depends_on_are_held_to_the_lock(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "repository", tmp_path / "weights.h5"
    (root / "code" / "__pycache__").mkdir(parents=True)
    for path in (root / "code" / "a.py", root / "out.json", elsewhere):
        path.write_text(path.name)
    listing = json.dumps([{"md5": dvc_md5(root / "code" / "a.py"), "relpath": "a.py"}])
    recorded = {
        "code": hashlib.md5(listing.encode()).hexdigest() + ".dir",
        str(elsewhere): dvc_md5(elsewhere),
        "../faces": "0.dir",
    }
    stage = {
        "deps": [{"path": path, "md5": md5} for path, md5 in recorded.items()],
        "outs": [{"path": "out.json", "md5": dvc_md5(root / "out.json")}],
    }
    (root / "dvc.lock").write_text(yaml.safe_dump({"stages": {"evaluate": stage}}))

    def stale() -> str:
        return " ".join(why_stale(root, ["out.json"]))

    # DVC passes over __pycache__. A clone need not hold what is outside of it.
    (root / "code" / "__pycache__" / "a.pyc").write_text("compiled")
    assert stale() == ""
    elsewhere.write_text("other weights")
    assert str(elsewhere) in stale()
    elsewhere.unlink()
    assert stale() == ""
    (root / "code" / "a.py").write_text("edited")
    assert "other contents of code;" in stale()
    shutil.rmtree(root / "code")
    assert "other contents of code;" in stale()


def test_a_command_that_dvc_would_run_again_makes_results_stale(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    for name in ("dvc.yaml", "dvc.lock", "params.yaml", "conf/packages.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    path = tmp_path / "dvc.yaml"
    text = path.read_text()

    def stale(old: str = "", new: str = "") -> bool:
        path.write_text(text.replace(old, new, 1))
        # All code is missing here, and comes after dvc.yaml in the list.
        (reason,) = why_stale(tmp_path, ["metrics/test.json"])
        return "dvc.yaml: the command of evaluate, facegender/" in reason

    assert not stale()
    assert stale("--model ${path.float32} --training-run", "--model ${path.int8} --training-run")
    # The results do not depend on the page.
    assert not stale("--page ${path.page}", "--page page.html")
    with pytest.raises(UserError, match=r"commands in dvc\.yaml: .*path\.other"):
        stale("--page ${path.page}", "--page ${path.other}")


@pytest.mark.parametrize("number", ["1e-7", "1.0e-7", "1e+20", "012", "1_000"])
def test_parameters_are_read_as_dvc_reads_them(tmp_path: Path, number: str) -> None:
    (tmp_path / "params.yaml").write_text(f"train:\n  learning_rate: {number}\n")
    written = load_yaml(tmp_path / "params.yaml")
    (tmp_path / "out.json").write_text("{}")
    outs = [{"path": "out.json", "md5": dvc_md5(tmp_path / "out.json")}]
    stage = {"params": {"params.yaml": written}, "outs": outs}
    dump_yaml(tmp_path / "dvc.lock", {"stages": {"train": stage}})
    assert why_stale(tmp_path, ["out.json"]) == []


def test_edited_results_of_the_baseline_get_no_verdict(
    project: Project, capsys: pytest.CaptureFixture
) -> None:
    path = project.root / "metrics/test.json"
    text = path.read_text()
    path.write_text(text + " ")
    project.commit("edited by hand")
    path.write_text(text)
    assert gate("--baseline", "HEAD") == 2
    assert "is not what its dvc.lock records" in capsys.readouterr().out
    assert edited_results(project.root, None, "HEAD") == ["metrics/test.json"]
    assert edited_results(project.root, None, project.first) == []


def test_the_committed_results_are_those_of_the_committed_lock() -> None:
    assert edited_results(ROOT, None, "HEAD") == []


# Clones that lack something, and outputs that fail: never a hang, and never exit code 1.


@pytest.fixture
def clone_of(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that clones the project, with a second commit, and enters the clone."""
    project.spoil(1)
    project.commit("worse")
    project.git("config", "uploadpack.allowFilter", "true")

    def clone(*options: str) -> Path:
        root = tmp_path_factory.mktemp("clone") / "clone"
        run_command("git", "clone", "--quiet", *options, project.root.as_uri(), root)
        os.chdir(root)
        return root

    return clone


def test_a_partial_clone_fetches_the_baseline_or_says_why_not(
    clone_of: Callable[..., Path], capsys: pytest.CaptureFixture, project: Project
) -> None:
    root = clone_of("--filter=blob:none")
    hidden = project.root.rename(project.root.with_name("hidden"))
    assert gate() == 2
    out = capsys.readouterr().out
    assert "git cat-file failed: fatal:" in out
    hidden.rename(project.root)
    assert gate() == 0
    assert "compared with the commit before HEAD" in capsys.readouterr().out
    assert commit_of(root) == project.git("rev-parse", "HEAD")


def test_a_shallow_clone_is_told_so(
    clone_of: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    clone_of("--depth=1")
    for options in ((), ("--baseline", "HEAD~1")):
        assert gate(*options) == 2
        assert "`git fetch --unshallow`" in capsys.readouterr().out


def test_a_clone_of_another_owner_is_no_regression(
    project: Project, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    for options in ((), ("--baseline", "HEAD")):
        assert gate(*options) == 2
        assert "safe.directory" in capsys.readouterr().out
    assert commit_of(project.root) is None


def test_a_command_that_must_succeed_does_not_fail_in_silence(project: Project) -> None:
    missing = ("config", "--get", "no.such")
    assert git(project.root, *missing) == ""
    with pytest.raises(UserError, match="git config failed: exit code 1"):
        checked_git(project.root, *missing)


def test_a_git_that_hangs_is_ended(
    project: Project,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    folder = tmp_path_factory.mktemp("bin")
    (folder / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (folder / "git").chmod(0o755)
    monkeypatch.setattr("facegender.runtime.git._GIT_SECONDS", 0.2)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        assert gate() == 2
    assert "took more than 0.2 seconds" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert gate() == 2
    assert "Cannot run git" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("output", "code", "says"),
    [("| true", 0, ""), ("> /dev/full", 2, "error: Cannot write the verdict: No space left")],
)
def test_an_output_that_fails_is_no_regression(
    project: Project, output: str, code: int, says: str
) -> None:
    command = (
        f"{sys.executable} -c '{FACEGENDER}' gate --baseline HEAD {output}; exit ${{PIPESTATUS[0]}}"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = run_command("bash", "-c", command, cwd=project.root, env=env, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(says)
    assert len(done.stderr.splitlines()) == (1 if says else 0)


def test_a_fault_of_the_gate_is_no_regression(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    bug = RuntimeError("a bug")
    monkeypatch.setattr("facegender.gate.compare.judge", Mock(side_effect=bug))
    assert gate() == 2
    assert "RuntimeError: a bug" in capsys.readouterr().err


def test_a_baseline_can_be_an_experiment(project: Project, capsys: pytest.CaptureFixture) -> None:
    project.git("update-ref", "refs/exps/ab/cdef/able-stag", project.first)
    assert gate("--baseline", "able-stag") == 0
    assert f"able-stag ({project.first[:10]})" in capsys.readouterr().out
    project.git("update-ref", "refs/exps/cd/abcd/able-stag", project.commit("other"))
    assert gate("--baseline", "able-stag") == 2
    assert "Several experiments are called" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("params.yaml", "gate: 1\n", "params.yaml is not valid"),
        ("metrics/test.json", "{", "Cannot read the results of the work tree"),
        ("metrics/test.json", "[]", "not a JSON object"),
        (
            "metrics/predictions.csv",
            "path,label\na,0\n",
            "no column probability, predicted, sha256",
        ),
        ("metrics/predictions.csv", "", "Cannot read the results"),
        ("metrics/export.json", "{}", "of the work tree: 'float32' is missing. `dvc repro`"),
        ("dvc.lock", "", "dvc.lock is missing or has no stages: run `dvc repro`"),
        ("dvc.yaml", "stages: {}\n", "dvc.yaml of the work tree: it is missing, or has no `vars`"),
        # As a merge leaves them; each is one line that says where.
        ("params.yaml", "a: 1\n<<<<<<< HEAD\n", "params.yaml: line 3: could not find"),
        ("dvc.lock", "a: 1\n<<<<<<< HEAD\n", "dvc.lock of the work tree: line 3: could not find"),
        ("dvc.yaml", "a: 1\n<<<<<<< HEAD\n", "of the work tree: line 3: could not find"),
    ],
)
def test_what_cannot_be_read_is_no_regression(
    project: Project, capsys: pytest.CaptureFixture, file: str, content: str, says: str
) -> None:
    (project.root / file).write_text(content)
    assert gate("--baseline", "HEAD") == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"label": 2},
        {"label": None},
        {"predicted": None},
        {"probability": None},
        {"probability": 1.5},
    ],
    ids=str,
)
def test_predictions_that_are_none_are_refused(change: dict) -> None:
    table = pd.read_csv(ROOT / "metrics" / "predictions.csv", dtype=object)
    for column, value in change.items():
        table.loc[3, column] = value
    with pytest.raises(UserError, match="the predictions have"):
        parse_results("x", "{}", predictions=table.to_csv(index=False))


def test_a_training_of_no_epochs_has_no_speed() -> None:
    results = parse_results("x", "{}", speed="epoch,seconds,images_per_second\n")
    assert results.costs["training_seconds"] == 0
    assert pd.isna(results.costs["training_images_per_second"])


def test_text_of_the_metadata_stays_text() -> None:
    text = (
        "path,label,probability,predicted,sha256,country,code\n"
        "a.jpg,0,0.1,0,aa,NA,007\n"
        "b.jpg,1,0.9,1,bb,None,7\n"
        "c.jpg,1,0.9,1,cc,,7\n"
    )
    found = parse_results("x", "{}", predictions=text).predictions
    assert found is not None
    assert found["country"].dropna().tolist() == ["NA", "None"]
    assert found["code"].tolist() == ["007", "7", "7"]
