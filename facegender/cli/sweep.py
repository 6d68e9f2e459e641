"""`facegender sweep`."""

import argparse
import os
import re
import secrets
from pathlib import Path

from facegender.cli.arguments import whole_number
from facegender.runtime.dvc_context import project_root, tracking_uri


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Run every combination of a grid's values as a DVC experiment, and mark the one with the "
        "lowest validation loss in MLflow. Exit code 1 if an experiment failed; the others still "
        "run."
    )
    parser.add_argument(
        "grid", nargs="?", type=Path, help="YAML file (default: conf/sweep.yaml)", metavar="GRID"
    )
    parser.add_argument(
        "--jobs", type=whole_number, default=1, help="experiments at the same time (default: 1)"
    )
    add_name(parser, "sweep")
    parser.set_defaults(run=sweep)


def add_name(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add the option that names the run in MLflow, and with a number each experiment."""
    parser.add_argument(
        "--name",
        type=experiment_name,
        default=f"{kind}-{secrets.token_hex(3)}",
        help=f"name of the run in MLflow (default: {kind}- and a random number)",
    )


def experiment_name(text: str) -> str:
    """Return the text if git and DVC take it as the beginning of an experiment's name."""
    if not re.fullmatch(r"\w(?:[\w.-]*[\w-])?", text, re.ASCII) or ".." in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a name of letters, digits, `-`, `_` and single dots between them"
        )
    return text


def sweep(args: argparse.Namespace) -> int:
    """Run the experiments."""
    from facegender.runtime.sweep import read_grid, run_sweep
    from facegender.tracking import connection

    root, environment = project_root(), dict(os.environ)
    grid = read_grid(args.grid or root / "conf" / "sweep.yaml")
    connection.connect(root, tracking_uri())
    failed = run_sweep(root, grid, name=args.name, jobs=args.jobs, environment=environment)
    return int(failed > 0)
