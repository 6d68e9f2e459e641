"""The documents for contributors name files, targets and versions that exist."""

import re
from importlib.metadata import version

import pytest
import yaml

from tests.conftest import tracked
from tools.compose_params import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PATHS = re.findall(
    r"`((?:facegender|stages|tests|conf|docs|tools|bench|\.devcontainer)/[\w./]*)`", TEXT
)


@pytest.mark.parametrize("path", sorted(set(PATHS)))
def test_a_path_that_is_named_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_questions_have_a_file_each() -> None:
    below = TEXT.split("## Where is it?")[1].split("\n## ")[0]
    files = re.findall(r"^\| .+ \| `([\w/.]+)` \|$", below, re.MULTILINE)
    assert len(set(files)) == len(files) >= 16


def test_every_folder_is_on_the_map() -> None:
    below = TEXT.split("## Map")[1].split("\n## ")[0]
    folders = {f"facegender/{init.parent.name}/" for init in ROOT.glob("facegender/*/__init__.py")}
    assert sorted(folder for folder in folders if f"`{folder}`" not in below) == []


def test_each_target_that_is_named_exists() -> None:
    targets = re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for path in tracked("*.md"):
        named = re.findall(r"(?:`|^ {4})make ([a-z][a-z-]*)", path.read_text(), re.MULTILINE)
        assert set(named) <= set(targets), path


def test_dvcs_hooks_are_of_the_version_that_is_installed() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (dvc,) = (repo for repo in repos if repo["repo"].endswith("/dvc"))
    assert dvc["rev"] == version("dvc")
    assert {hook["id"] for hook in dvc["hooks"]} == {
        "dvc-pre-commit",
        "dvc-pre-push",
        "dvc-post-checkout",
    }
