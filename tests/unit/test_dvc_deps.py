"""dvc.yaml lists what each stage's script imports: no stale result, no needless rerun."""

from pathlib import Path

import pytest
import yaml

from facegender.errors import UserError
from facegender.runtime.packages import check_packages
from tools.pin_packages import locked_versions
from tools.stage_deps import ROOT, imported_modules, imported_packages, modules_of

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# `report` prints a digest of all of the code, and so depends on all of it; `list` runs each time.
EXACT = [stage for stage in STAGES if stage not in {"report", "list"}]


def listed_modules(stage: str) -> set[str]:
    deps = [dep for dep in STAGES[stage]["deps"] if dep.startswith("facegender")]
    return {module for dep in deps for module in modules_of(dep)}


@pytest.mark.parametrize("stage", EXACT)
def test_the_modules_that_a_stage_imports_are_its_deps(stage: str) -> None:
    assert listed_modules(stage) == imported_modules(stage), "`make deps` writes them"


def test_the_report_depends_on_all_that_it_imports() -> None:
    assert imported_modules("report") <= listed_modules("report")


@pytest.mark.parametrize("stage", EXACT)
def test_each_package_that_decides_a_stages_bytes_is_a_parameter_of_it(stage: str) -> None:
    (listed,) = (
        item["conf/packages.yaml"] for item in STAGES[stage]["params"] if isinstance(item, dict)
    )
    assert listed == imported_packages(stage), "`make deps` writes them"


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
