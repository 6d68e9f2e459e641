"""What a stage's script imports is what dvc.yaml lists: no stale result, no needless rerun."""

from functools import cache

import grimp
import pytest
import yaml

from tools.compose_params import ROOT

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
    return grimp.build_graph("facegender", "stages", exclude_type_checking_imports=True)


def imported_modules(module: str) -> set[str]:
    """Return the modules that a module imports, directly or not, without those left unlisted."""
    found: set[str] = set()
    ahead = {module}
    while ahead:
        found |= ahead
        direct = {
            name for item in ahead for name in graph().find_modules_directly_imported_by(item)
        }
        ahead = {name for name in direct - found if not name.startswith((*UNLISTED, *SOURCES))}
    return found - {module, "facegender"}


def path_of(module: str) -> str:
    path = module.replace(".", "/")
    return f"{path}/__init__.py" if (ROOT / path).is_dir() else f"{path}.py"


def listed_modules(stage: str) -> set[str]:
    return {dep for dep in STAGES[stage]["deps"] if dep.startswith("facegender")}


@pytest.mark.parametrize("stage", STAGES)
def test_each_module_that_a_stage_imports_is_a_dep(stage: str) -> None:
    imported = {path_of(module) for module in imported_modules(f"stages.{stage}")}
    covered = {path for path in imported for dep in listed_modules(stage) if path.startswith(dep)}
    assert sorted(imported - covered) == []


# `report` prints a digest of all of the code, and so depends on all of it.
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "report"])
def test_each_dep_is_a_module_that_the_stage_imports(stage: str) -> None:
    imported = {path_of(module) for module in imported_modules(f"stages.{stage}")}
    listed = {
        path.relative_to(ROOT).as_posix()
        for dep in listed_modules(stage)
        for path in ([ROOT / dep] if dep.endswith(".py") else (ROOT / dep).rglob("*.py"))
    }
    assert listed - imported == BY_PATH.get(stage, set())
