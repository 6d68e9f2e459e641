"""Stage 2: a manifest for each of train, validation and test, and plots of their classes."""

import argparse
import json
from pathlib import Path

from facegender import plots
from facegender.command import run_stage
from facegender.labels import LABELS
from facegender.manifest import build_manifest, write_manifest
from facegender.params import load_params
from facegender.splits import drop_label_conflicts, split_at_random, split_by_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--raw", type=Path, required=True, help="directory of class folders")
    parser.add_argument("--splits", type=Path, required=True, help="directory to make")
    parser.add_argument("--plots", type=Path, required=True, help="directory to make")
    args = parser.parse_args()
    params = load_params(args.params).split

    manifest = build_manifest(args.raw, **params.classes.model_dump())
    manifest, conflicts = drop_label_conflicts(manifest)
    if params.predefined:
        parts = split_by_folder(
            manifest, validation_fraction=params.validation_fraction, seed=params.seed
        )
    else:
        parts = split_at_random(
            manifest,
            test_fraction=params.test_fraction,
            validation_fraction=params.validation_fraction,
            seed=params.seed,
        )

    args.splits.mkdir(parents=True, exist_ok=True)
    args.plots.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        write_manifest(part, args.splits / f"{name}.csv")
    counts = {
        name: {label: int((part["label"] == value).sum()) for label, value in LABELS.items()}
        for name, part in parts.items()
    }
    summary = {
        "counts": counts,
        "duplicates": int(manifest["sha256"].duplicated().sum()),
        "under_both_labels": conflicts,
    }
    (args.splits / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for name, count in counts.items():
        plots.class_distribution(
            count,
            f"Class distribution, {name} part ({sum(count.values())} images)",
            args.plots / f"class_distribution_{name}.png",
        )


if __name__ == "__main__":
    run_stage(main)
