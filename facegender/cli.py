"""The command `facegender`."""

import argparse
import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path

from facegender.command import project_root, run_command
from facegender.errors import UserError
from facegender.files import find_images


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
        "label is how a face is perceived in the training data; it is no fact about a person. "
        "Exit code 1 when an image could not be read; the others are still printed.",
    )
    predict.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a file, a folder (searched through), or - for the bytes of one image on standard "
        "input",
    )
    predict.add_argument("--model", type=Path, help="a .keras file (default: models/model.keras)")
    predict.add_argument(
        "--threshold", type=float, default=0.5, help="P(male) from which the label is male (0.5)"
    )
    form = predict.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    form.add_argument("--csv", action="store_true", help="CSV with a header")
    args = parser.parse_args(arguments)
    return _predict(args)


def _predict(args: argparse.Namespace) -> int:
    sources = _sources(args.images)
    # After the arguments: TensorFlow takes seconds to import, and a typo should not.
    from facegender.model import load_model
    from facegender.prediction import predict_images

    model = load_model(args.model or project_root() / "models" / "model.keras")
    failed = 0
    table = csv.writer(sys.stdout, lineterminator="\n")
    if args.csv:
        table.writerow(["image", "label", "probability", "error"])
    for prediction in predict_images(model, sources, threshold=args.threshold):
        failed += prediction.error is not None
        if args.json:
            print(json.dumps(asdict(prediction)))
        elif args.csv:
            table.writerow(
                [prediction.image, prediction.label, prediction.probability, prediction.error]
            )
        elif prediction.error is not None:
            print(f"{prediction.image}: {prediction.error}", file=sys.stderr)
        else:
            print(
                f"{prediction.label:<6}  P(male) = {prediction.probability:.4f}  {prediction.image}"
            )
    return int(failed > 0)


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
