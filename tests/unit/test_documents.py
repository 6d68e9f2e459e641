"""What documents and messages tell a reader to type, set or look at exists."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.hydra import get_hydra_sweeps

from facegender.cli.main import COMMANDS, _run
from facegender.errors import UserError
from facegender.params import load_params
from tests.conftest import tracked
from tools.compose_params import ROOT, compose

DOCUMENTS = [path for path in tracked("*.md") if path.name != "CHANGELOG.md"]
# A word of a shell may hold the end of a line only between quotes.
_WORD = r"""(?:"[^"]*"|'[^']*'|[^\s`"'])+"""
_OVERRIDES = re.compile(rf"(?<!git log )-S\s+{_WORD}(?:\s+-S\s+{_WORD})*")
# What the reader of a part of a command has set before.
_CONTEXTS = ((), ("dataset=kaggle",), ("dataset=table", "dataset.path=PATH"))


def texts() -> Iterator[tuple[str, str]]:
    """Yield the name and text of documents, parameters and code; lines of a command are joined."""
    for path in [*DOCUMENTS, *tracked("conf/*.yaml", "facegender/*.py", "Makefile")]:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":  # a message may be several literals
            text = re.sub(r'"\s*\n\s*f?"', "", text).replace('\\"', '"')
        yield path.relative_to(ROOT).as_posix(), re.sub(r"\\\n#?", " ", text)


def overrides() -> list[frozenset[str]]:
    """Return the overrides of each command, without those that are part of another's."""
    found: set[frozenset[str]] = set()
    for _, text in texts():
        for command in _OVERRIDES.finditer(text):
            # All plain paths are alike.
            shown = re.sub(r"(path|weights)=/[\w./]+", r"\1=PATH", command[0])
            words = [word.rstrip(",.;") for word in shlex.split(shown) if "=" in word]
            sets = [re.split(r"\s+(?=[\w.]+=)", word) for word in words]
            # `bench.recipes` takes a set in each word.
            if any(len(one) > 1 for one in sets) or str(words).count("recipe=") > 1:
                found.update(map(frozenset, sets))
            else:
                found.add(frozenset(words))
    return sorted((one for one in found if not any(one < other for other in found)), key=sorted)


def problem_of(given: frozenset[str], path: Path) -> str | None:
    """Return why overrides do not compose to valid parameters, or None if they do."""
    problems = []
    for context in _CONTEXTS:
        try:
            for words in get_hydra_sweeps({"params": [*context, *sorted(given)]}):
                compose(path, *words["params"])
                load_params(path)
        except UserError as error:
            problems.append(str(error))
        except Exception as error:  # Hydra's and ANTLR's have no common class
            problems.append(repr(error))
        else:
            return None
    return problems[0]


@pytest.mark.parametrize("given", overrides(), ids=sorted)
def test_parameters_that_are_shown_can_be_set(given: frozenset[str], tmp_path: Path) -> None:
    assert problem_of(given, tmp_path / "params.yaml") is None


def test_overrides_are_found_with_their_quotes() -> None:
    found = _OVERRIDES.findall("dvc exp run -S a=1 -S \"b='x y'\" # -S\n`-S c=[0]`, git log -S D")
    assert found == ["-S a=1 -S \"b='x y'\"", "-S c=[0]"]


def test_commands_and_options_that_are_shown_exist(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {
        (name, found[1], option)
        for name, text in texts()
        for found in re.finditer(
            r"(?:`|^(?:#? {3,}|\t@?))facegender ([a-z][a-z-]*)([^\n`#|]*)", text, re.M
        )
        for option in ["", *re.findall(r"(?<=[ \[])--?[A-Za-z][a-z-]*", found[2])]
    }
    helps = {}
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            _run([command, "--help"])
        helps[command] = capsys.readouterr().out
    assert len(shown) > 60
    wrong = [
        one for one in sorted(shown) if not re.search(rf"(?<!\S){one[2]}\b", helps.get(one[1], ""))
    ]
    assert wrong == []


def test_options_of_measurements_and_tools_that_are_shown_exist() -> None:
    shown = {
        (name, found[1], option)
        for name, text in texts()
        for found in re.finditer(r"python -m ((?:bench|tools|facegender)\.[\w.]+)([^\n`#|]*)", text)
        for option in ["", *re.findall(r"(?<= )--[a-z-]+", found[2])]
    }
    assert len(shown) > 30
    wrong = [
        (name, module, option)
        for name, module, option in sorted(shown)
        if f'"{option}'.rstrip('"') not in (ROOT / f"{module.replace('.', '/')}.py").read_text()
    ]
    assert wrong == []


def test_parameters_that_are_named_exist(tmp_path: Path) -> None:
    known: list[dict[str, Any]] = []
    labels = ["dataset.labels.pattern='(?P<label>.)'"]
    for source in (["sample"], ["kaggle"], ["table"], ["filename", *labels]):
        path = [] if source[0] in ("sample", "kaggle") else ["dataset.path=x"]
        compose(tmp_path / "params.yaml", f"dataset={source[0]}", *source[1:], *path)
        known.append(yaml.safe_load((tmp_path / "params.yaml").read_text()))
    parameter = re.compile(rf"(?<![\w./])((?:{'|'.join(known[0])})(?:\.[a-z][a-z_0-9]*)+)\b(?!\()")

    def exists(dotted: str) -> bool:
        return any(has(content, dotted.split(".")) for content in known)

    wrong = {
        (name, dotted)
        for name, text in texts()
        for dotted in parameter.findall(text)
        if name.endswith((".md", ".yaml"))
        and not exists(dotted)
        # Files, and a column of Parquet.
        and not dotted.endswith((".md", ".py", ".json", ".yaml", ".png", ".tflite", ".bytes"))
    }
    assert wrong == set()


def has(content: Any, keys: list[str]) -> bool:
    """Return whether nested mappings have a key; any floor exists, and each part of a table."""
    if not keys or content is None:
        return True
    return isinstance(content, dict) and keys[0] in content and has(content[keys[0]], keys[1:])


def test_tests_and_variables_that_are_named_exist() -> None:
    tests = {path.name: path.read_text() for path in tracked("tests/*.py")}
    code = "".join(path.read_text() for path in tracked("facegender/*.py", "bench/*.py"))
    wrong = []
    for name, text in texts():
        for file, test in re.findall(r"(test_\w+\.py)(?:::(?:\w+::)?(\w+))?", text):
            if file not in tests or (test and f"def {test}(" not in tests[file]):
                wrong.append((name, file, test))
        wrong += [(name, one) for one in re.findall(r"FACEGENDER_[A-Z_]+", text) if one not in code]
    assert wrong == []


def test_links_lead_to_files_and_headings() -> None:
    wrong = []
    for path in tracked("*.md"):
        for file, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", path.read_text()):
            target = path.parent / file if file else path
            text = target.read_text() if anchor else ""
            headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings]
            if not target.exists() or (anchor and anchor not in slugs):
                wrong.append((path.name, file, anchor))
    assert wrong == []
