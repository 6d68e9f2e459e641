from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.pipeline.conftest import first_repro, new_clone, reproduced  # noqa: F401

EXTRAS = ("boto3", "distributed", "flask_wtf", "moto", "psycopg2", "pyspark")
MISSING = [name for name in EXTRAS if find_spec(name) is None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the extras where they are not installed: all here but test_strategy.py."""
    if not MISSING:
        return
    here = Path(__file__).parent
    skip = pytest.mark.skip(reason=f"needs {', '.join(MISSING)}: make install-scale")
    for item in items:
        if item.path.parent == here and item.path.stem != "test_strategy":
            item.add_marker(skip)
