"""`facegender gate`."""

import argparse
import json
import sys

from facegender.errors import UserError
from facegender.runtime.entry_points import project_root


def add_gate(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Judge the results in the work tree (run `dvc repro` first) by the gate's floors in "
        "params.yaml, and compare them with a baseline, image by image. Exit code 0: pass, "
        "perhaps with warnings; 1: a regression, or below a floor; 2: no verdict is possible, "
        "and why. docs/gate.md explains how the verdict is reached."
    )
    parser.add_argument(
        "--baseline",
        metavar="REV",
        help="commit, branch, tag or DVC experiment to compare with (default: the merge base with "
        "main; on main, HEAD, or the commit before it if the results are those of HEAD)",
    )
    parser.add_argument(
        "--format",
        choices=("text", "markdown", "json"),
        default="text",
        help="form of the verdict (default: text)",
    )
    parser.add_argument(
        "--accept-data-change",
        action="store_true",
        help="compare even if the test set or its labels changed, or predictions are missing; the "
        "comparison is unpaired, and so less sensitive",
    )
    parser.set_defaults(run=gate)


def gate(args: argparse.Namespace) -> int:
    """Print the verdict and return its exit code."""
    from facegender.gate.compare import judge_work_tree
    from facegender.gate.verdict import as_markdown, as_text
    from facegender.params import load_params

    try:
        root = project_root()
        report = judge_work_tree(
            root,
            load_params(root / "params.yaml"),
            args.baseline,
            accept_data_change=args.accept_data_change,
        )
    except UserError as error:
        # Exit code 1 would mean that the model is worse.
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.format == "json":
        print(json.dumps(report.to_json(), indent=2, allow_nan=False))
    else:
        print({"text": as_text, "markdown": as_markdown}[args.format](report), end="")
    return report.exit_code
