"""The command `facegender`."""

import argparse
import csv
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from facegender.command import project_root, run_command, tracking_uri
from facegender.errors import UserError
from facegender.files import find_images
from facegender.prediction import (
    BATCH_SIZE,
    Prediction,
    Predictor,
    keras_predictor,
    predict_images,
)

# Fewer images are done before a bar could be read.
BAR_FROM = 50


def main() -> None:
    """Run the command line; the entry point of the installed command."""
    run_command(lambda: _run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="facegender",
        description="Label face photos by perceived gender with the model of `dvc repro`, and "
        "choose the model that is served.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    predict = commands.add_parser(
        "predict",
        help="print the label and P(male) of images",
        description="Print the label and the probability of the label `male` for each image. The "
        "labels are two, female and male: the gender that the faces of a dataset were perceived "
        "to have. A label is no fact about a person. "
        "Exit code 1 when an image could not be read; the others are still printed.",
    )
    predict.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a file, a folder (searched through), or - for the bytes of one image on standard "
        "input",
    )
    predict.add_argument(
        "--model",
        type=Path,
        help="a .tflite file, or a .keras file, which takes seconds to load "
        "(default: models/model.tflite)",
    )
    predict.add_argument(
        "--threshold", type=float, default=0.5, help="P(male) from which the label is male (0.5)"
    )
    predict.add_argument(
        "--abstain-below",
        type=_confidence,
        default=0.5,
        metavar="P",
        help="answer `uncertain` when the likelier label has a probability below P, from 0.5 "
        "(never) to 1",
    )
    form = predict.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    form.add_argument("--csv", action="store_true", help="CSV with a header")
    predict.set_defaults(run=_predict)
    _add_registry(commands)
    args = parser.parse_args(arguments)
    return args.run(args)


def _add_registry(commands: Any) -> None:
    promote = commands.add_parser(
        "promote",
        help="make a run's model the champion, which is served, if it passes the gate",
        description="Register the model of a run and have it judged, beside the champion if there "
        "is one. It gets the alias `challenger`, and if it passes `champion`: what `mlflow models "
        "serve -m models:/facegender@champion` serves when it starts next. Exit code 1 when it "
        "does not pass; the champion then stays.",
    )
    promote.add_argument(
        "mlflow_run", metavar="RUN", help="id of an MLflow run, its beginning, or a run's name"
    )
    promote.add_argument(
        "--force", action="store_true", help="promote it even if it fails; needs --reason"
    )
    promote.add_argument(
        "--reason", type=_reason, metavar="TEXT", help="why, which is kept with the version"
    )
    promote.set_defaults(run=_promote, parser=promote)
    rollback = commands.add_parser(
        "rollback",
        help="put the former champion back",
        description="Put the former champion back. Once more puts back the one before it.",
    )
    rollback.set_defaults(run=_rollback)
    models = commands.add_parser(
        "models",
        help="list the registered models, and which is the champion",
        description="List the versions that were registered by `facegender promote`.",
    )
    models.add_argument("--json", action="store_true", help="one JSON object a line")
    models.set_defaults(run=_models)


def _reason(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text.strip()


def _confidence(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.5 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.5 and 1")
    return value


def _predict(args: argparse.Namespace) -> int:
    sources = _sources(args.images)
    model = args.model or project_root() / "models" / "model.tflite"
    predictions = predict_images(
        _load(model, len(sources)),
        sources,
        threshold=args.threshold,
        abstain_below=args.abstain_below,
    )
    failed = 0
    if args.csv:
        print(_csv_line(field.name for field in fields(Prediction)))
    with tqdm(
        total=len(sources),
        unit="image",
        leave=False,
        disable=len(sources) < BAR_FROM or not sys.stderr.isatty(),
    ) as bar:
        for prediction in predictions:
            failed += prediction.error is not None
            bar.update()
            if args.json:
                line = json.dumps(asdict(prediction))
            elif args.csv:
                line = _csv_line(astuple(prediction))
            else:
                line = _text(prediction)
            # Through the bar, which may share the terminal.
            plain_error = prediction.error is not None and not (args.json or args.csv)
            bar.write(line, file=sys.stderr if plain_error else sys.stdout)
    return int(failed > 0)


def _load(path: Path, images: int) -> list[Predictor]:
    # Each runtime is imported only when its kind of model is named: Keras takes seconds.
    if path.suffix == ".tflite":
        from facegender.litert import load_litert

        batches = math.ceil(images / BATCH_SIZE)
        return [load_litert(path) for _ in range(min(batches, os.cpu_count() or 1))]
    if path.suffix == ".keras":
        from facegender.model import load_model

        # Once, for TensorFlow computes on all cores by itself.
        return [keras_predictor(load_model(path))]
    raise UserError(f"The model {path.name} is neither a .tflite nor a .keras file.")


def _text(prediction: Prediction) -> str:
    if prediction.error is not None:
        return f"{prediction.image}: {prediction.error}"
    return f"{prediction.label:<6}  P(male) = {prediction.probability:.4f}  {prediction.image}"


def _csv_line(values: Iterable[object]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(values)
    return buffer.getvalue()


def _promote(args: argparse.Namespace) -> int:
    if args.force != (args.reason is not None):
        args.parser.error("--force and --reason need each other")
    with _registry() as (registry, lock):
        from facegender.judging import judge

        run = registry.find_run(args.mlflow_run)
        done = registry.promote(run, judge, lock=lock, force_reason=args.reason)
    name = f"version {done.version} (run {run.info.run_id[:12]}, {run.info.run_name})"
    if done.verdict is None:
        print(f"{name} is the champion already")
        return 0
    print(done.verdict.report)
    before = f"version {done.former} stays the champion" if done.former else "there is no champion"
    if not done.champion:
        raise UserError(
            f"{name} does not pass: {before}. To promote it all the same, say why: `facegender "
            f"promote {args.mlflow_run} --force --reason TEXT`."
        )
    how = "passes and" if done.verdict.passed else "does not pass, but by force"
    after = f", after version {done.former}, which `facegender rollback` puts back"
    print(f"{name} {how} is the champion now{after if done.former else ''}")
    return 0


def _rollback(args: argparse.Namespace) -> int:
    with _registry() as (registry, lock):
        before, now = registry.rollback(lock=lock)
    print(f"version {now} is the champion again, version {before} no longer")
    return 0


def _models(args: argparse.Namespace) -> int:
    with _registry() as (registry, _):
        versions = registry.list_versions()
    for item in versions:
        if args.json:
            print(json.dumps(asdict(item)))
            continue
        accuracy = "" if item.test_accuracy is None else f"  test accuracy {item.test_accuracy:.4f}"
        forced = f"  by force: {item.forced_reason}" if item.forced_reason else ""
        state = f"{', '.join(item.aliases):<10}  gate: {item.gate or 'none':<6}"
        run = f"run {item.run_id[:12]} ({item.run_name})"
        print(f"version {item.version:<3}  {state}{accuracy}  {run}{forced}")
    if not versions:
        print("no model is registered: `facegender promote RUN` does it", file=sys.stderr)
    return 0


@contextmanager
def _registry() -> Iterator[tuple[ModuleType, Path]]:
    """Give the registry, connected, and the place of its lock; MLflow's errors become UserError."""
    # MLflow takes seconds to import, and predicting needs none of it.
    from mlflow.exceptions import MlflowException

    from facegender import registry, tracking

    root = project_root()
    try:
        tracking.connect(root, tracking_uri())
        yield registry, root / ".dvc" / "tmp" / "registry.lock"
    except MlflowException as error:
        # An address may hold a password.
        reason = re.sub(r"//[^/@\s]*@", "//", str(error))
        raise UserError(
            f"MLflow does not do it: {reason}. `facegender models` shows how things stand."
        ) from None


def _sources(arguments: list[str]) -> list[tuple[str, bytes | Path]]:
    sources: list[tuple[str, bytes | Path]] = []
    for argument in arguments:
        path = Path(argument)
        if argument == "-":
            sources.append(("-", sys.stdin.buffer.read()))
        elif path.is_dir():
            found = find_images(path)
            if not found:
                raise UserError(f"There is no image in the folder {argument}.")
            sources += [(str(path / image), path / image) for image in found]
        elif path.exists():
            sources.append((argument, path))
        else:
            raise UserError(f"There is no file or folder {argument}.")
    return sources
