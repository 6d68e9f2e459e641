"""Rules of SECURITY.md that the text of the repository must keep."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import fill, run_command, tracked
from tools.compose_params import ROOT
from tools.ui import server_command

LOOPBACK = {"127.0.0.1", "localhost"}


# Code that runs on people's machines. Tests make hostile files, also with pickle.
SOURCES = tracked("facegender/*.py", "stages/*.py", "bench/*.py", "tools/*.py")


def forbidden(paths: list[Path]) -> set[Path]:
    """Return the modules that can run code from data, or a shell.

    ruff finds modules that unpickle, shells, eval and unsafe YAML (pyproject.toml). It does not see
    whether arrays and models are loaded safely.
    """
    command = ["ruff", "check", "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    command += ["--output-format", "json", *map(str, paths)]
    faults = json.loads(run_command(*command, check=False).stdout)
    found = [fault for fault in faults if re.match(r"S\d|TID251", fault["code"] or "")]
    unsafe = (
        r"to_pickle|np\.load\((?![^)]*allow_pickle=False)"
        r"|keras[\w.]*\.load_model\((?![^)]*safe_mode=True)"
    )
    return {Path(fault["filename"]) for fault in found} | {
        path for path in paths if re.search(unsafe, path.read_text(encoding="utf-8"))
    }


def test_no_module_can_run_code_from_data_or_a_shell() -> None:
    assert forbidden(SOURCES) == set()


def test_the_rules_find_what_they_forbid_and_nothing_else(tmp_path: Path) -> None:
    bad = [
        "import pickle",
        "from joblib import dump",
        "import cloudpickle.x",
        "import joblib; joblib.load(x)",
        "import pandas as pd; pd.read_pickle(x)",
        "table.to_pickle(x)",
        "np.load(x)",
        "np.load(x, allow_pickle=True)",
        "keras.saving.load_model(x)",
        "keras.saving.load_model(x, safe_mode=False)",
        "import keras; keras.config.enable_unsafe_deserialization()",
        "import subprocess; subprocess.run(x, shell=True)",
        "import os; os.system(x)",
        "import yaml; yaml.load(x)",
        "eval(x)",
    ]
    good = [
        "import joblib; joblib.Parallel(2)(joblib.delayed(f)(x) for x in y)",
        "np.load(x, allow_pickle=False)",
        "keras.saving.load_model(x, safe_mode=True); load_model(x); mlflow.pyfunc.load_model(x)",
        "import subprocess; subprocess.run([x])",
        "import yaml; yaml.safe_load(x)",
    ]
    texts = {f"{number}.py": f"{source}\n" for number, source in enumerate([*bad, *good])}
    fill(tmp_path, texts)
    paths = [tmp_path / name for name in texts]
    assert forbidden(paths) == set(paths[: len(bad)])


def test_no_parameter_gets_into_a_shell() -> None:
    # DVC has a shell run the commands. Paths are written in dvc.yaml; parameters anybody may set.
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    commands = [stage.get("do", stage)["cmd"] for stage in stages.values()]
    used = {name for command in commands for name in re.findall(r"\$\{(.*?)\}", command)}
    assert "path.raw" in used
    assert [name for name in sorted(used) if not name.startswith("path.")] == []


def servers(text: str) -> list[str]:
    """Return the commands in a text that start a server, each with its options."""
    joined = text.replace("\\\n", " ")
    return re.findall(
        r"(?:mlflow[ \t]+(?:ui|server|models[ \t]+serve|gateway[ \t]+start)"
        r"|facegender[ \t]+serve|python3?[ \t]+-m[ \t]+http\.server"
        r"|uvicorn|gunicorn|waitress-serve)"
        r"\b[^`#\n|;&]*",
        joined,
    )


def host(command: str) -> str | None:
    found = re.search(r"(?:--host|--bind|-h|-b)[ =]+(\S+)", command)
    return found and found[1].partition(":")[0]


def test_every_documented_server_is_for_this_machine_alone() -> None:
    texts = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in tracked("*.md", "Makefile", ".ci/*", ".github/*", "*.yaml", "*.yml")
    }
    commands = [(name, command) for name, text in texts.items() for command in servers(text)]
    commands += [("make ui", shown) for shown in servers(" ".join(server_command(5000, "store")))]
    assert {"Makefile", "make ui"} <= {name for name, _ in commands}
    assert [item for item in commands if host(item[1]) not in LOOPBACK | {None}] == []
    # MLflow alone may be left to its default, which the test below looks up.
    bare = [item for item in commands if host(item[1]) is None]
    assert [item for item in bare if not item[1].startswith("mlflow")] == []


def test_servers_are_found_with_their_hosts() -> None:
    text = "run `mlflow ui` or\n\n    mlflow server \\\n      --host 0.0.0.0 --port 1\nuvicorn a:b"
    assert [host(command) for command in servers(text)] == [None, "0.0.0.0", None]
    assert host("mlflow models serve -m x -h 127.0.0.1") == "127.0.0.1"
    assert host("gunicorn -b 0.0.0.0:80 x") == "0.0.0.0"


@pytest.mark.parametrize("words", [("server",), ("models", "serve")])
def test_mlflow_by_itself_binds_to_this_machine(words: tuple[str, ...]) -> None:
    from mlflow.cli import cli

    command = cli
    for word in words:
        command = command.commands[word]
    (option,) = [option for option in command.params if option.name == "host"]
    assert option.default == "127.0.0.1"


def test_mlflow_ui_is_mlflow_server() -> None:
    from mlflow.cli import AliasedGroup, cli

    assert isinstance(cli, AliasedGroup)
    assert cli.get_command(None, "ui") is cli.commands["server"]
