"""Stage 4: MobileNet, trained, with its history; opens the pipeline's MLflow run."""

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from facegender.faces.settings import crop_of
from facegender.inference.model_crop import write_crop
from facegender.params import flatten, load_params
from facegender.runtime.dvc_context import (
    check_inputs,
    input_tags,
    project_root,
    read_lock,
    run_name_and_tags,
    tracking_uri,
    worker_wait,
)
from facegender.runtime.entry_points import run_stage
from facegender.runtime.optional_packages import without_packages
from facegender.runtime.output_capture import hide_native_notes
from facegender.training import rendezvous
from facegender.training import strategy as distribution


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--processed", type=Path, required=True, help="directory of the images")
    parser.add_argument("--splits", type=Path, required=True, help="directory of the manifests")
    parser.add_argument("--model", type=Path, required=True, help="file to write (.keras)")
    parser.add_argument("--training-run", type=Path, required=True, help="file for its MLflow id")
    parser.add_argument("--history", type=Path, required=True, help="CSV of metrics an epoch")
    parser.add_argument("--speed", type=Path, required=True, help="CSV of speed an epoch")
    args = parser.parse_args()
    params = load_params(args.params)
    read = [args.processed / "train", args.processed / "validation"]
    check_inputs(args.params.with_name("dvc.lock"), [*read, args.splits])

    cluster = None
    if params.train.strategy == "multi_worker":
        cluster = rendezvous.read_worker_group(os.environ.get("TF_CONFIG"))
        rendezvous.require_chief(cluster)

    # After the arguments, so that --help and a bad parameter do not wait for TensorFlow.
    with hide_native_notes(), without_packages("matplotlib", "sklearn"):
        from facegender.data.processed import ProcessedSplit
        from facegender.model.saved_model import save_model
        from facegender.tracking import connection, log, runs
        from facegender.training import calibration, checkpoints
        from facegender.training import train as training

    connection.connect(project_root(), tracking_uri())
    name, tags = run_name_and_tags()
    inputs = input_tags(read_lock(args.params), ["download", "split", "preprocess"])
    train, validation = (ProcessedSplit(args.processed / name) for name in ("train", "validation"))
    digest = checkpoints.inputs_digest(params, [train, validation])
    folder = project_root() / ".dvc" / "tmp" / "facegender"
    with checkpoints.open_checkpoint(folder, digest) as checkpoint, ExitStack() as stack:
        if cluster is not None:
            job = rendezvous.TrainingJob(params.to_json(), checkpoint.content())
            rendezvous.accept_workers(cluster, job, digest, worker_wait())
        strategy = stack.enter_context(
            distribution.open_strategy(params.train.strategy, worker_wait())
        )
        run = stack.enter_context(
            runs.training_run(
                name=name,
                params=flatten(params),
                tags={**tags, **inputs},
                manifests={name: args.splits / f"{name}.csv" for name in ("train", "validation")},
                resume=checkpoint.run_id,
            )
        )
        checkpoint.run_id = run.info.run_id
        network = training.new_network(params, strategy)
        result = training.train_network(
            network,
            train,
            validation,
            params.train,
            strategy=strategy,
            on_epoch=log.log_epoch,
            checkpoint=checkpoint,
            verbose=1 if sys.stdout.isatty() else 2,  # a bar per step, or a line per epoch in a log
        )
        slope, intercept = (
            calibration.calibrate(network, validation) if params.train.calibrate else (1.0, 0.0)
        )
        for path in (args.model, args.history):
            path.parent.mkdir(parents=True, exist_ok=True)
        save_model(network.inference(slope, intercept), args.model)
        write_crop(args.model, crop_of(params.image))
        result.history.to_csv(args.history, index=False, lineterminator="\n")
        result.speed.to_csv(args.speed, index=False, lineterminator="\n")
        runs.write_run_id(run, args.training_run)
        checkpoint.remove()
    print(
        f"kept epoch {result.kept_epoch} of {len(result.history)} ({params.train.keep}); "
        f"calibration: slope {slope:.3f}, intercept {intercept:.3f}"
    )


if __name__ == "__main__":
    run_stage(main)
