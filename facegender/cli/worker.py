"""`facegender worker`."""

import argparse
import os
from pathlib import Path

from facegender.errors import UserError
from facegender.runtime.dvc_context import pipeline_paths, project_root


def add_worker(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Take part in a training on several machines: train.strategy is multi_worker, TF_CONFIG "
        "names this machine as worker 1 or above, and `dvc repro` runs on worker 0, whose "
        "parameters apply. The worker needs the same commit and data/processed (`dvc pull "
        "preprocess`) and writes nothing. See docs/scaling-training.md."
    )
    parser.add_argument(
        "--processed", type=Path, help="folder of the images (default: data/processed)"
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=3600,
        metavar="SECONDS",
        help="how long to wait for worker 0 to start training (default: 3600)",
    )
    parser.set_defaults(run=worker)


def worker(args: argparse.Namespace) -> int:
    """Take part in one training."""
    from facegender.runtime.output_capture import hide_native_notes
    from facegender.training.rendezvous import read_worker_group

    group = read_worker_group(os.environ.get("TF_CONFIG"))
    if group.index == 0:
        raise UserError("TF_CONFIG names this machine as worker 0: run `dvc repro` here.")
    root = project_root()
    paths = pipeline_paths((root / "dvc.yaml").read_text(encoding="utf-8"))
    # After the checks because it imports TensorFlow.
    with hide_native_notes():
        from facegender.training.worker import run_worker

    epochs = run_worker(group, args.processed or root / paths["processed"], args.wait)
    print(f"helped to train {epochs} epochs; worker 0 has the results")
    return 0
