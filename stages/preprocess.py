"""Stage 3: decode and resize every image, and describe the data in metrics/data.json."""

import argparse
import json
from pathlib import Path

from facegender.data.face_table import read_faces
from facegender.data.invalid_limit import check_invalid
from facegender.data.manifest import SPLITS, read_manifest
from facegender.data.preprocessing import write_split
from facegender.faces.settings import crop_of
from facegender.params import load_params
from facegender.runtime.dvc_context import check_inputs
from facegender.runtime.entry_points import run_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--raw", type=Path, required=True, help="directory of the images")
    parser.add_argument("--info", type=Path, required=True, help="JSON file that download wrote")
    parser.add_argument("--splits", type=Path, required=True, help="directory of the manifests")
    parser.add_argument("--processed", type=Path, required=True, help="directory to create")
    parser.add_argument("--metrics", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    params = load_params(args.params)
    check_inputs(args.params.with_name("dvc.lock"), [args.raw, args.info, args.splits])

    summary = json.loads((args.splits / "summary.json").read_text())
    # Images that the split stage refused, and below those that cannot be decoded now.
    invalid = summary.pop("invalid")
    total = summary.pop("files")
    crop = crop_of(params.image)
    faces = read_faces(args.splits / "faces.csv") if crop else None
    for name in SPLITS:
        manifest = read_manifest(args.splits / f"{name}.csv")
        training = crop is not None and name == "train"
        invalid += write_split(
            manifest,
            args.raw,
            args.processed / name,
            size=params.image.size,
            name=name,
            crop=crop,
            faces=faces,
            border=round(params.image.size * params.image.crop.jitter) if training else 0,
            **params.compute.where,
        )

    source = json.loads(args.info.read_text())
    report = {
        **summary,
        "total": total,
        "invalid": {"count": len(invalid), "images": invalid},
        # Files of the source that the pipeline does not use.
        "left_out": source.get("left_out", {}),
        "other_files": source.get("other_files", {}),
    }
    args.metrics.parent.mkdir(parents=True, exist_ok=True)
    args.metrics.write_text(json.dumps(report, indent=2) + "\n")
    check_invalid(
        {item["path"]: item["reason"] for item in invalid}, total, params.data.max_invalid_fraction
    )


if __name__ == "__main__":
    run_stage(main)
