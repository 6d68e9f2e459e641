"""Parallel to training: list labels that are probably wrong, and pictures that show little."""

import argparse
import json
from pathlib import Path

from facegender.data.manifest import SPLITS, write_table
from facegender.data.processed import ProcessedSplit
from facegender.data.splits import read_shared_groups
from facegender.evaluation import label_audit
from facegender.params import load_params
from facegender.runtime.dvc_context import check_inputs
from facegender.runtime.entry_points import run_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--processed", type=Path, required=True, help="directory of the images")
    parser.add_argument("--splits", type=Path, required=True, help="directory of the manifests")
    parser.add_argument("--issues", type=Path, required=True, help="CSV to write")
    parser.add_argument("--plots", type=Path, required=True, help="directory to write")
    args = parser.parse_args()
    params = load_params(args.params)
    check_inputs(args.params.with_name("dvc.lock"), [args.processed, args.splits])

    splits = {name: ProcessedSplit(args.processed / name) for name in SPLITS}
    found = label_audit.audit(splits, params, read_shared_groups(args.splits))
    args.plots.mkdir(parents=True, exist_ok=True)
    args.issues.parent.mkdir(parents=True, exist_ok=True)
    write_table(found.issues, args.issues)
    label_audit.draw_worst(splits, found, args.plots / "issues.png")
    summary = {
        "images": found.images,
        "accuracy": found.accuracy,
        "not_judged": found.not_judged,
        "issues": found.counts,
    }
    (args.plots / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(found.summary())


if __name__ == "__main__":
    run_stage(main)
