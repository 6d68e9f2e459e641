"""What a stage's script imports is what dvc.yaml lists: no stale result, no needless rerun."""

from functools import cache
from pathlib import Path

import grimp
import pytest
import yaml

from facegender.errors import UserError
from facegender.runtime.packages import check_packages
from tools.compose_params import ROOT
from tools.pin_packages import PACKAGES, locked_versions

# Modules that decide no result: errors and signals, the parser of params.yaml (DVC watches the
# parameters themselves), and what is logged.
UNLISTED = (
    "facegender.errors",
    "facegender.params",
    "facegender.runtime",
    "facegender.tracking",
)
# One of these sources is in use: dvc.yaml names it as ${dataset.input}.
SOURCES = ("facegender.data.sources.kaggle", "facegender.data.sources.sample")
# MLflow logs this file by its path.
BY_PATH = {"evaluate": {"facegender/inference/serving.py"}}
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(
        "facegender",
        "stages",
        include_external_packages=True,
        exclude_type_checking_imports=True,
    )


def imported_modules(module: str, unlisted: tuple[str, ...] = (*UNLISTED, *SOURCES)) -> set[str]:
    """Return the modules that a module imports, directly or not, without those left unlisted."""
    found: set[str] = set()
    ahead = {module}
    while ahead:
        found |= ahead
        direct = {
            name
            for item in ahead
            if item.startswith(("facegender", "stages"))
            for name in graph().find_modules_directly_imported_by(item)
        }
        ahead = {name for name in direct - found if not name.startswith(unlisted)}
    return found - {module, "facegender"}


def own_modules(stage: str) -> set[str]:
    modules = imported_modules(f"stages.{stage}")
    return {path_of(module) for module in modules if module.startswith("facegender")}


def path_of(module: str) -> str:
    path = module.replace(".", "/")
    return f"{path}/__init__.py" if (ROOT / path).is_dir() else f"{path}.py"


def listed_modules(stage: str) -> set[str]:
    return {dep for dep in STAGES[stage]["deps"] if dep.startswith("facegender")}


@pytest.mark.parametrize("stage", STAGES)
def test_each_module_that_a_stage_imports_is_a_dep(stage: str) -> None:
    imported = own_modules(stage)
    covered = {path for path in imported for dep in listed_modules(stage) if path.startswith(dep)}
    assert sorted(imported - covered) == []


# `report` prints a digest of all of the code, and so depends on all of it.
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "report"])
def test_each_dep_is_a_module_that_the_stage_imports(stage: str) -> None:
    imported = own_modules(stage)
    listed = {
        path.relative_to(ROOT).as_posix()
        for dep in listed_modules(stage)
        for path in ([ROOT / dep] if dep.endswith(".py") else (ROOT / dep).rglob("*.py"))
    }
    assert listed - imported == BY_PATH.get(stage, set())


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "report"])
def test_each_package_that_decides_a_stages_bytes_is_a_parameter_of_it(stage: str) -> None:
    (listed,) = (
        item["conf/packages.yaml"] for item in STAGES[stage]["params"] if isinstance(item, dict)
    )
    imported = imported_modules(f"stages.{stage}", UNLISTED)
    used = sorted(PACKAGES[name] for name in imported & PACKAGES.keys())
    assert listed == used


def test_the_pinned_packages_are_those_of_the_lock() -> None:
    pinned = yaml.safe_load((ROOT / "conf/packages.yaml").read_text())
    assert pinned == locked_versions((ROOT / "requirements.lock").read_text())


def test_another_version_than_the_pinned_one_is_an_error(tmp_path: Path) -> None:
    check_packages(ROOT / "conf/packages.yaml")
    (tmp_path / "packages.yaml").write_text("numpy: [1.0.0]\nno-such-package: ['2', '3']\n")
    with pytest.raises(
        UserError, match=r"instead of 1\.0\.0, no-such-package none instead of 2 or 3"
    ):
        check_packages(tmp_path / "packages.yaml")
