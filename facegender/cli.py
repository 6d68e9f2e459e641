"""The command `facegender`."""

import argparse
import csv
import io
import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, astuple, fields
from pathlib import Path

from tqdm import tqdm

from facegender.command import project_root, run_command
from facegender.errors import UserError
from facegender.files import find_images
from facegender.prediction import (
    BATCH_SIZE,
    Prediction,
    Predictor,
    keras_predictor,
    predict_images,
)

# No image is larger; standard input may have no end.
MAX_STDIN_BYTES = 500_000_000
# Fewer images are done before a bar could be read.
BAR_FROM = 50


def main() -> None:
    """Run the command line; the entry point of the installed command."""
    run_command(lambda: _run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="facegender",
        description="Label face photos by perceived gender with the model of `dvc repro`.",
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
    args = parser.parse_args(arguments)
    return _predict(args)


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
        # Names that are not UTF-8 are printed as they are.
        sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
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
        from facegender.litert import load_litert, probe_litert

        probe_litert(path)
        batches = math.ceil(images / BATCH_SIZE)
        return [load_litert(path) for _ in range(min(batches, os.cpu_count() or 1))]
    if path.suffix == ".keras":
        from facegender.model import load_model

        # Once, for TensorFlow computes on all cores by itself.
        return [keras_predictor(load_model(path))]
    raise UserError(f"The model {path.name} is neither a .tflite nor a .keras file.")


def _text(prediction: Prediction) -> str:
    # A name may hold line breaks, and commands to the terminal.
    name = "".join(c if c.isprintable() else repr(c)[1:-1] for c in prediction.image)
    if prediction.error is not None:
        return f"{name}: {prediction.error}"
    return f"{prediction.label:<6}  P(male) = {prediction.probability:.4f}  {name}"


def _csv_line(values: Iterable[object]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(values)
    return buffer.getvalue()


def _sources(arguments: list[str]) -> list[tuple[str, bytes | Path]]:
    sources: list[tuple[str, bytes | Path]] = []
    for argument in arguments:
        path = Path(argument)
        if argument == "-":
            content = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
            if len(content) > MAX_STDIN_BYTES:
                raise UserError(f"Standard input has more than {MAX_STDIN_BYTES:,} bytes.")
            sources.append(("-", content))
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
