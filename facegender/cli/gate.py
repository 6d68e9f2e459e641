"""`facegender gate`."""

import argparse

from facegender.runtime.dvc_context import project_root


def add_gate(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Judge the results in the work tree (run `dvc repro` first) by the gate's floors in "
        "params.yaml, and compare them with a baseline, image by image. Exit code 0: pass, "
        "perhaps with warnings; 1: a regression, or below a floor; 2: no verdict is possible, "
        "and why; 3: too few images for what gate.test and gate.without_evidence require. "
        "docs/gate.md explains how the verdict is reached."
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
        help="compare even if the same images have other labels, if the test set lost its hardest "
        "images, or if the baseline's model cannot be scored on it; in the last case, and without "
        "predictions, the comparison is unpaired, which is less sensitive",
    )
    parser.add_argument(
        "--accept-rule-change",
        action="store_true",
        help="judge by the gate's rules in the work tree even where they are looser than the "
        "baseline's",
    )
    parser.add_argument(
        "--require-evidence",
        action="store_true",
        help="exit with 3 instead of 0 if the test set is too small to detect a drop of accuracy "
        "as large as the tolerance, as gate.without_evidence: refuse does",
    )
    parser.set_defaults(run=gate)


def gate(args: argparse.Namespace) -> int:
    """Print the verdict and return its exit code."""
    from facegender.gate.compare import judge_work_tree
    from facegender.gate.run import print_verdict
    from facegender.gate.verdict import Report
    from facegender.params import load_params

    def judge() -> Report:
        root = project_root()
        return judge_work_tree(
            root,
            load_params(root / "params.yaml"),
            args.baseline,
            accept_data_change=args.accept_data_change,
            accept_rule_change=args.accept_rule_change,
            require_evidence=args.require_evidence,
        )

    return print_verdict(judge, args.format)
