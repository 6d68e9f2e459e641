"""Stage 1: fetch the images into data/raw, and write their origin to data/raw.json."""

import argparse
import json
from pathlib import Path

from facegender.data.sources.archive import ArchiveLimits
from facegender.data.sources.fetch import fetch_dataset
from facegender.files import write_atomically
from facegender.params import load_params
from facegender.runtime.dvc_context import project_root
from facegender.runtime.entry_points import run_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--raw", type=Path, required=True, help="directory to create")
    parser.add_argument("--info", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    params = load_params(args.params)

    known = json.loads(args.info.read_text()) if args.info.is_file() else None
    info = fetch_dataset(
        params.dataset,
        args.raw,
        limits=ArchiveLimits.from_params(params.archive),
        known=known,
        root=project_root(),
        cache=project_root() / ".dvc" / "tmp" / "kaggle",
    )
    # Atomic: DVC keeps this file (`persist`), and the next download reads it.
    write_atomically(args.info, json.dumps(info, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    run_stage(main)
