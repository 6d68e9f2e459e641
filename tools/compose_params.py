"""Compose params.yaml from conf/, with the function that `dvc exp run` uses."""

import sys
from pathlib import Path

from dvc.utils.hydra import compose_and_dump

ROOT = Path(__file__).parent.parent


def compose(output: Path, *overrides: str) -> None:
    """Write conf/, with overrides such as `train.epochs=5`, to a YAML file."""
    compose_and_dump(output, str(ROOT / "conf"), None, "config", "", list(overrides))


if __name__ == "__main__":
    compose(Path(sys.argv[1]), *sys.argv[2:])
