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


@pytest.mark.parametrize(
    ("heading", "columns"), [("Bad input", 4), ("Ordinary faults of datasets", 3)]
)
def test_at_least_forty_are_proved(heading: str, columns: int) -> None:
    table = rows(heading)
    assert len({cells[0] for cells in table}) == len(table) >= 40
    for cells in table:
        assert len(cells) == columns
        assert all(cells)
        path, _, name = cells[-1].strip("`").partition("::")
        name, _, case = name.rpartition("::")[2].partition("[")
        assert f"def {name}(" in (ROOT / path).read_text()
        assert not case or case.rstrip("]") in BAD | GOOD | CSVS
