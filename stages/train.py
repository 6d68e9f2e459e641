"""Stage 4: MobileNet, trained, with its history; opens the pipeline's MLflow run."""

import argparse
from pathlib import Path

from facegender.command import (
    check_inputs,
    fit_verbosity,
    input_tags,
    project_root,
    run_name_and_tags,
    run_stage,
    tracking_uri,
)
from facegender.params import flatten, load_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--processed", type=Path, required=True, help="directory of the images")
    parser.add_argument("--splits", type=Path, required=True, help="directory of the manifests")
    parser.add_argument("--model", type=Path, required=True, help="file to write (.keras)")
    parser.add_argument("--run", type=Path, required=True, help="file for the MLflow run's id")
    parser.add_argument("--history", type=Path, required=True, help="CSV of metrics an epoch")
    parser.add_argument("--speed", type=Path, required=True, help="CSV of speed an epoch")
    args = parser.parse_args()
    params = load_params(args.params)
    check_inputs(args.params.with_name("dvc.lock"), [args.processed, args.splits])

    # After the arguments, so that --help and a bad parameter need not wait for TensorFlow.
    from facegender import checkpoints, model, tracking, training
    from facegender.processed import Part

    tracking.connect(project_root(), tracking_uri())
    name, tags = run_name_and_tags()
    inputs = input_tags(args.params.with_name("dvc.lock"), ["download", "split", "preprocess"])
    train, validation = Part(args.processed / "train"), Part(args.processed / "validation")
    digest = checkpoints.training_digest(
        params=params.model_dump_json(),
        files=[
            *(part.directory / name for part in (train, validation) for name in Part.FILES),
            *(path for path in [Path(params.model.weights)] if path.is_file()),
        ],
        code=Path(checkpoints.__file__).parent,
    )
    folder = project_root() / ".dvc" / "tmp" / "facegender"
    with (
        checkpoints.open_checkpoint(folder, digest) as checkpoint,
        tracking.training_run(
            name=name,
            params=flatten(params),
            tags={**tags, **inputs},
            manifests={part: args.splits / f"{part}.csv" for part in ("train", "validation")},
            resume=checkpoint.run_id,
        ) as run,
    ):
        checkpoint.run_id = run.info.run_id
        network = training.new_network(params)
        result = training.train_network(
            network,
            train,
            validation,
            params.train,
            on_epoch=tracking.log_epoch,
            checkpoint=checkpoint,
            verbose=fit_verbosity(),
        )
        temperature = training.calibrate(network, validation) if params.train.calibrate else 1.0
        for path in (args.model, args.history):
            path.parent.mkdir(parents=True, exist_ok=True)
        model.save_model(network.inference(temperature), args.model)
        result.history.to_csv(args.history, index=False, lineterminator="\n")
        result.speed.to_csv(args.speed, index=False, lineterminator="\n")
        tracking.write_run_id(run, args.run)
        checkpoint.remove()
    print(
        f"kept epoch {result.kept_epoch} of {len(result.history)} ({params.train.keep}); "
        f"temperature {temperature:.3f}"
    )


if __name__ == "__main__":
    run_stage(main)
