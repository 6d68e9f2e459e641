"""Stage 2: a manifest for each of train, validation and test, and plots of their classes."""

import argparse
import json
from pathlib import Path

from facegender.data import checks
from facegender.data.labelling import build_manifest
from facegender.data.manifest import write_manifest
from facegender.data.splits import find_leaks, split_at_random, split_by_folder
from facegender.evaluation import plots
from facegender.labels import LABELS
from facegender.params import load_params
from facegender.runtime.dvc_context import check_inputs
from facegender.runtime.entry_points import run_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--raw", type=Path, required=True, help="directory of class folders")
    parser.add_argument("--splits", type=Path, required=True, help="directory to make")
    parser.add_argument("--plots", type=Path, required=True, help="directory to make")
    args = parser.parse_args()
    params = load_params(args.params)
    check_inputs(args.params.with_name("dvc.lock"), [args.raw])
    split, data = params.split, params.data

    manifest = build_manifest(args.raw, **split.classes.model_dump())
    findings = checks.Findings(data.checks.model_dump())
    manifest, fingerprints = checks.check_images(
        manifest,
        checks.fingerprint_images(manifest, args.raw),
        findings,
        min_side=data.min_side,
        max_aspect_ratio=data.max_aspect_ratio,
    )
    clusters = checks.find_clusters(manifest, fingerprints)
    known = dict(zip(manifest["path"], fingerprints, strict=True))
    manifest = checks.check_labels(manifest, clusters, findings, min_per_class=data.min_per_class)
    if split.predefined:
        findings.add("leakage", find_leaks(manifest, clusters))
        parts = split_by_folder(
            manifest,
            validation_fraction=split.validation_fraction,
            seed=split.seed,
            clusters=clusters,
        )
    else:
        parts = split_at_random(
            manifest,
            test_fraction=split.test_fraction,
            validation_fraction=split.validation_fraction,
            seed=split.seed,
            clusters=clusters,
        )
    parts = checks.drop_duplicates(parts, clusters, known, findings)

    args.splits.mkdir(parents=True, exist_ok=True)
    args.plots.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        write_manifest(part, args.splits / f"{name}.csv")
    write_manifest(findings.table(), args.splits / "dropped.csv")
    counts = {
        name: {label: int((part["label"] == value).sum()) for label, value in LABELS.items()}
        for name, part in parts.items()
    }
    found = findings.reasons
    summary = {
        "counts": counts,
        "balance": checks.class_balance(parts),
        "checks": findings.report(),
        "duplicates": sum(len(found.get(f"{kind}_duplicates", ())) for kind in ("exact", "near")),
        "under_both_labels": list(found.get("both_labels", ())),
        "invalid": [
            {"path": path, "reason": reason} for path, reason in found.get("invalid", {}).items()
        ],
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
