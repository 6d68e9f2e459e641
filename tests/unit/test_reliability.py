"""docs/reliability.md names tests that exist."""

import re

import pytest

from tests.bad_images import BAD, GOOD
from tests.unit.test_tables import CSVS
from tools.compose_params import ROOT

DOCUMENT = (ROOT / "docs" / "reliability.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its head."""
    below = DOCUMENT.split(f"\n## {heading}\n")[1]
    lines = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_at_least_forty_bad_inputs_are_proved() -> None:
    table = rows("Bad input")
    assert len({cells[0] for cells in table}) == len(table) >= 40
    assert all(len(cells) == 4 and all(cells) for cells in table)


def test_at_least_forty_ordinary_faults_are_proved() -> None:
    table = rows("Ordinary faults of datasets")
    assert len({cells[0] for cells in table}) == len(table) >= 40
    assert all(len(cells) == 3 and all(cells) for cells in table)


@pytest.mark.parametrize(
    "reference",
    sorted(
        {
            cells[-1].strip("`")
            for name in ("Bad input", "Ordinary faults of datasets")
            for cells in rows(name)
        }
    ),
)
def test_a_test_that_is_named_exists(reference: str) -> None:
    path, _, name = reference.partition("::")
    name, _, case = name.rpartition("::")[2].partition("[")
    assert f"def {name}(" in (ROOT / path).read_text()
    if case:
        assert case.rstrip("]") in BAD | GOOD | CSVS
