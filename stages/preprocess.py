"""Stage 3: decode and resize every image, and describe the data in metrics/data.json."""

import argparse
import json
from pathlib import Path

from facegender.data.face_images import crop_of
from facegender.data.face_table import read_faces
from facegender.data.manifest import SPLITS, read_manifest
from facegender.data.preprocessing import write_split
from facegender.errors import UserError
from facegender.params import load_params
from facegender.runtime.dvc_context import check_inputs
from facegender.runtime.entry_points import run_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--raw", type=Path, required=True, help="directory of the images")
    parser.add_argument("--splits", type=Path, required=True, help="directory of the manifests")
    parser.add_argument("--processed", type=Path, required=True, help="directory to create")
    parser.add_argument("--metrics", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    params = load_params(args.params)
    check_inputs(args.params.with_name("dvc.lock"), [args.raw, args.splits])

    summary = json.loads((args.splits / "summary.json").read_text())
    # Images that the split stage refused, which no manifest lists, and any that fail to decode now.
    invalid = summary.pop("invalid")
    total = len(invalid)
    crop = crop_of(params.image)
    faces = read_faces(args.splits / "faces.csv") if crop else None
    for name in SPLITS:
        manifest = read_manifest(args.splits / f"{name}.csv")
        total += len(manifest)
        invalid += write_split(
            manifest,
            args.raw,
            args.processed / name,
            size=params.image.size,
            name=name,
            scheduler=params.compute.cluster,
            patience=params.compute.patience,
            crop=crop,
            faces=faces,
        )

    report = {**summary, "total": total, "invalid": {"count": len(invalid), "images": invalid}}
    args.metrics.parent.mkdir(parents=True, exist_ok=True)
    args.metrics.write_text(json.dumps(report, indent=2) + "\n")
    if len(invalid) > params.data.max_invalid_fraction * total:
        shown = "; ".join(f"{item['path']}: {item['reason']}" for item in invalid[:10])
        raise UserError(
            f"{len(invalid)} of {total} images cannot be read, more than data.max_invalid_fraction "
            f"= {params.data.max_invalid_fraction} allows: {shown}. All are listed in "
            f"{args.metrics.name}. List them in the file that data.exclude names, or raise the "
            "limit."
        )


if __name__ == "__main__":
    run_stage(main)
