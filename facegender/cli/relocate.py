"""`facegender relocate`."""

import argparse

from facegender.runtime.dvc_context import project_root


def add_relocate(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "MLflow stores absolute paths to its artifacts. This rewrites them after the folder was "
        "moved or copied. `make ui` and every run of the pipeline do the same."
    )
    parser.set_defaults(run=relocate)


def relocate(_: argparse.Namespace) -> int:
    """Rewrite the paths."""
    from facegender.tracking import connection

    # The repository's own store, even if MLFLOW_TRACKING_URI names another.
    moved = connection.connect(project_root())
    print(f"{moved} paths rewritten" if moved else "nothing to do: the paths are right")
    return 0
