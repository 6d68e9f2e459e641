"""Stage 2: check the images, and write a manifest and a plot of the classes of each split."""

import argparse
import json
from pathlib import Path

from facegender.data import checks
from facegender.data.invalid import check_invalid
from facegender.data.labelling import build_manifest
from facegender.data.manifest import write_table
from facegender.evaluation import plots
from facegender.labels import LABELS
from facegender.params import load_params
from facegender.runtime.dvc_context import check_inputs
from facegender.runtime.entry_points import run_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--raw", type=Path, required=True, help="directory of class folders")
    parser.add_argument("--splits", type=Path, required=True, help="directory to create")
    parser.add_argument("--plots", type=Path, required=True, help="directory to create")
    args = parser.parse_args()
    params = load_params(args.params)
    check_inputs(args.params.with_name("dvc.lock"), [args.raw])

    manifest = build_manifest(args.raw, **params.split.classes.model_dump())
    splits, findings = checks.clean(manifest, args.raw, params.data, params.split)

    args.splits.mkdir(parents=True, exist_ok=True)
    args.plots.mkdir(parents=True, exist_ok=True)
    for name, images in splits.items():
        write_table(images, args.splits / f"{name}.csv")
    write_table(findings.table(), args.splits / "dropped.csv")
    counts = {
        name: {label: int((images["label"] == value).sum()) for label, value in LABELS.items()}
        for name, images in splits.items()
    }
    check_invalid(
        findings.reasons.get("invalid", {}), len(manifest), params.data.max_invalid_fraction
    )
    summary = {
        "files": len(manifest),
        "counts": counts,
        "balance": checks.class_balance(splits),
        **findings.summary(),
    }
    (args.splits / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for name, count in counts.items():
        plots.class_distribution(
            count,
            f"Class distribution, {name} split ({sum(count.values())} images)",
            args.plots / f"class_distribution_{name}.png",
        )


if __name__ == "__main__":
    run_stage(main)
