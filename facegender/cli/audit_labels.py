"""`facegender audit-labels`."""

import argparse
from pathlib import Path

from facegender.errors import UserError
from facegender.runtime.dvc_context import pipeline_paths, project_root


def add_audit_labels(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "List images whose label is probably wrong, and pictures that are dark, bright, blurred or "
        "show little, the worst first, and draw a grid of their faces. The stage audit_labels does "
        "the same; this takes other weights, or writes to another file. It reads the processed "
        "data of `dvc repro preprocess`. To leave an image out, name it in the file of "
        "data.exclude."
    )
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="network that judges the labels: imagenet, or a file without top (default: "
        "model.weights)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="CSV to write, and a PNG of the same name (default: label_issues.csv)",
    )
    parser.set_defaults(run=audit_labels)


def audit_labels(args: argparse.Namespace) -> int:
    """Write the list and the grid, and print how many there are."""
    from facegender.data.manifest import SPLITS, write_table
    from facegender.data.processed import ProcessedSplit
    from facegender.data.splits import read_shared_groups
    from facegender.evaluation import label_audit
    from facegender.params import load_params

    root = project_root()
    output = args.output or root / "label_issues.csv"
    if output.suffix == ".png" or output.is_dir():
        raise UserError(f"Cannot write the list to {output}: name a .csv file.")
    paths = pipeline_paths((root / "dvc.yaml").read_text())
    params = load_params(root / "params.yaml")
    if args.weights is not None:
        own = {"weights": args.weights, "weights_sha256": None}
        params = params.model_copy(update={"model": params.model.model_copy(update=own)})
    processed = root / paths["processed"]
    splits = {name: ProcessedSplit(processed / name) for name in SPLITS}
    found = label_audit.audit(splits, params, read_shared_groups(root / paths["splits"]))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_table(found.issues, output)
    label_audit.draw_worst(splits, found, output.with_suffix(".png"))
    print(f"{output}: {found.summary()}")
    return 0
