"""The rules of CONTRIBUTING.md on imports, which keep commands fast and small changes small."""

import ast
from pathlib import Path

import pytest

from tests.conftest import run_command, run_python
from tools.compose_params import ROOT

PACKAGES = sorted((ROOT / "facegender").rglob("__init__.py"))


def test_a_folder_imports_only_what_is_below_it() -> None:
    run_command("lint-imports", "--no-cache", "--no-logo")


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: path.parent.name)
def test_an_init_imports_nothing(path: Path) -> None:
    """One line each, but for the package's own, which also looks for old names of modules."""
    docstring, *rest = ast.parse(path.read_text()).body
    assert ast.get_docstring(ast.Module([docstring], []))
    old_names = ['__path__.append(f"{__path__[0]}/old_names")']
    assert [ast.unparse(line).replace("'", '"') for line in rest] == (
        old_names if path.parent.name == "facegender" else []
    )


@pytest.mark.parametrize(
    "module", ["cli.main", "data.decode_rows", "data.fingerprints", "data.sources.kaggle"]
)
def test_what_must_start_fast_imports_nothing_heavy(module: str) -> None:
    heavy = "{'tensorflow', 'keras', 'mlflow', 'pandas', 'kaggle'}"
    program = f"import sys, facegender.{module}; print(*{heavy} & sys.modules.keys())"
    assert run_python(program).stdout.strip() == ""
