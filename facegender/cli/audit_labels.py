"""`facegender audit-labels`."""

import argparse
from pathlib import Path

from facegender.errors import UserError
from facegender.runtime.dvc_context import pipeline_paths, project_root


def add_audit_labels(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "List images whose label is probably wrong, and pictures that are dark, bright, blurred or "
        "show little, the worst first, with a grid of faces beside the list. It reads the "
        "processed data of `dvc repro preprocess`, and changes nothing: name an image in the file "
        "of data.exclude to leave it out. Features come from model.weights, which must not be "
        "none."
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="CSV to write, and a PNG of the same name (default: metrics/label_issues.csv)",
    )
    parser.set_defaults(run=audit_labels)


def audit_labels(args: argparse.Namespace) -> int:
    """Write the list and the grid, and print how many there are."""
    from facegender.data.manifest import SPLITS, write_table
    from facegender.data.processed import ProcessedSplit
    from facegender.evaluation.plots import face_grid
    from facegender.params import load_params
    from facegender.training import label_audit

    root = project_root()
    paths = pipeline_paths((root / "dvc.yaml").read_text())
    params = load_params(root / "params.yaml")
    processed = root / paths["processed"]
    splits = {name: ProcessedSplit(processed / name) for name in SPLITS}
    features = label_audit.extract_features(splits, params)
    try:
        issues = label_audit.find_issues(
            splits, features, group_by=params.split.group_by, seed=params.split.seed
        )
    except ValueError as error:
        raise UserError(f"Cannot judge the labels: {error} Add images.") from error
    output = args.output or root / "metrics" / "label_issues.csv"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_table(issues, output)
    worst = issues[issues["issue"] == "label"].head(25)
    face_grid(
        label_audit.pictures(splits, worst),
        worst["label"].to_numpy(),
        worst["probability"].to_numpy(),
        "Labels that are probably wrong, the worst first",
        output.with_suffix(".png"),
        threshold=0.5,
    )
    counts = issues["issue"].value_counts().sort_index().to_dict()
    shown = ", ".join(f"{kind} {count}" for kind, count in counts.items()) or "no issue"
    print(f"{output}: {shown}, of {sum(map(len, splits.values()))} images")
    return 0
