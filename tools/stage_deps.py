"""Write the module deps and package versions of each stage into dvc.yaml, from what it imports."""

from functools import cache
from pathlib import Path

import grimp
from ruamel.yaml import YAML

from tools.pin_packages import PACKAGES

ROOT = Path(__file__).parent.parent
# Modules that decide no result: errors and signals, the parser of params.yaml (DVC watches the
# parameters themselves), and what is logged.
UNLISTED = ("facegender.errors", "facegender.params", "facegender.runtime", "facegender.tracking")
# One of these sources is in use: dvc.yaml names it as ${dataset.input}.
SOURCES = ("facegender.data.sources.kaggle", "facegender.data.sources.sample")
# MLflow logs this file by its path.
BY_PATH = {"evaluate": {"facegender/inference/serving.py"}}


@cache
def _graph() -> grimp.ImportGraph:
    return grimp.build_graph(
        "facegender",
        "stages",
        # A build with other options, such as import-linter's, marks a stale cache as fresh.
        cache_dir=None,
        include_external_packages=True,
        exclude_type_checking_imports=True,
    )


def _imports(stage: str, unlisted: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    ahead = {f"stages.{stage}"}
    while ahead:
        found |= ahead
        direct = {
            name
            for item in ahead
            if item.startswith(("facegender", "stages"))
            for name in _graph().find_modules_directly_imported_by(item)
        }
        ahead = {name for name in direct - found if not name.startswith(unlisted)}
    return found - {f"stages.{stage}"}


def imported_modules(stage: str) -> set[str]:
    """Return the files under facegender/ that a stage runs and that can change its results."""
    modules = {
        name.replace(".", "/")
        for name in _imports(stage, (*UNLISTED, *SOURCES))
        if name.startswith("facegender.")
    }
    files = {f"{name}.py" for name in modules if not (ROOT / name).is_dir()}
    return files | BY_PATH.get(stage, set())


def imported_packages(stage: str) -> list[str]:
    """Return the packages that decide a stage's results, in order of name."""
    return sorted(PACKAGES[name] for name in _imports(stage, UNLISTED) & PACKAGES.keys())


def modules_of(dep: str) -> set[str]:
    """Return the modules that a dep under facegender/ covers: itself, or all of a folder."""
    if dep.endswith(".py"):
        return {dep}
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / dep).rglob("*.py")
        if path.name != "__init__.py"
    }


def module_deps(stage: str) -> list[str]:
    """Return a stage's deps under facegender/: a folder where it imports all of it, else files."""
    modules = imported_modules(stage)
    folders = {str(Path(module).parent) for module in modules}
    exact = {folder for folder in folders if modules_of(folder) <= modules}
    return sorted({folder if (folder := str(Path(m).parent)) in exact else m for m in modules})


def main() -> None:
    """Rewrite dvc.yaml in place; comments stay."""
    editor = YAML()  # keeps comments
    editor.width = 100
    editor.indent(mapping=2, sequence=4, offset=2)
    path = ROOT / "dvc.yaml"
    content = editor.load(path)
    for name, stage in content["stages"].items():
        # `report` prints a digest of all of the code; `list` runs each time.
        if name in {"report", "list"}:
            continue
        deps = stage["deps"]
        index = next(i for i, dep in enumerate(deps) if dep.startswith("facegender/"))
        for old in [dep for dep in deps if dep.startswith("facegender/")]:
            deps.remove(old)
        deps[index:index] = module_deps(name)
        for item in stage["params"]:
            if isinstance(item, dict):
                item["conf/packages.yaml"] = imported_packages(name)
    editor.dump(content, path)


if __name__ == "__main__":
    main()
