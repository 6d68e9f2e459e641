"""Stage 2: check the images, and write a manifest and a plot of the classes of each split."""

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

from facegender.data import checks
from facegender.data.exclusions import read_exclusions
from facegender.data.face_table import find_all_faces
from facegender.data.given_boxes import read_boxes
from facegender.data.invalid_limit import check_invalid
from facegender.data.labelling_notes import Notes
from facegender.data.manifest import COLUMNS, write_table
from facegender.data.raw_manifest import build_manifest
from facegender.data.splits import write_shared_groups
from facegender.evaluation import plots
from facegender.faces.settings import crop_of
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

    notes = Notes()
    crop = crop_of(params.image)
    boxes = params.image.crop.boxes if crop else None
    manifest = build_manifest(
        args.raw,
        **params.split.classes.model_dump(),
        labels=params.dataset.labels,
        boxes=boxes,
        exclude=read_exclusions(Path(params.data.exclude)),
        max_unlabelled=params.data.max_invalid_fraction,
        notes=notes,
    )
    where = params.compute.where
    faces = None
    if crop:
        faces = find_all_faces(
            manifest,
            args.raw,
            crop,
            boxes=read_boxes(args.raw, list(manifest["path"]), boxes, notes) if boxes else None,
            **where,
        )
    splits, findings = checks.clean(
        manifest, args.raw, params.data, params.split, faces, args.splits.parent, **where
    )

    args.splits.mkdir(parents=True, exist_ok=True)
    args.plots.mkdir(parents=True, exist_ok=True)
    for name, images in splits.items():
        write_table(images, args.splits / f"{name}.csv")
    write_shared_groups(args.splits, splits, findings.groups)
    dropped = pd.concat([notes.table(), findings.table()], ignore_index=True)
    write_table(dropped, args.splits / "dropped.csv")
    found: dict[str, Any] = {}
    if faces is not None:
        write_table(faces, args.splits / "faces.csv")
        missed = findings.missed
        not_grouped = [name for name in manifest.columns.drop(COLUMNS) if name not in missed]
        found = {"faces": {"missed_by_group": missed, "not_grouped": not_grouped}}
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
        **notes.summary(),
        **findings.summary(),
        **found,
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
