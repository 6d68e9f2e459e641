"""`facegender predict`."""

import argparse
import csv
import errno
import io
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from facegender.cli.arguments import folder_path, probability
from facegender.data.image_files import PassedOver, find_images
from facegender.errors import UserError
from facegender.runtime.dvc_context import project_root
from facegender.runtime.redaction import escape_controls

if TYPE_CHECKING:
    from facegender.inference.prediction import Prediction

# Standard input may never end, and no image is larger.
MAX_STDIN_BYTES = 500_000_000
# Fewer images are done before anyone can read a progress bar.
BAR_FROM = 50
# Path and digest of data in dvc.lock. Parsing its YAML takes longer than predicting an image.
_DIGEST = re.compile(r"path: ((?:data|models)/.+)\n +hash: md5\n +md5: (.+)\n")


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Print the label and the probability of `male` for each image, or for each face in it if "
        "the model was trained with image.face: crop. The labels, female and "
        "male, record how people perceived the faces of a dataset. They are not facts about a "
        "person. Exit code 1 if an image or a folder could not be read; the others are still "
        "printed. `no face` is not an error. Other files in a folder are counted on standard error."
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a file, a folder (searched recursively), or - to read one image from standard input",
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="a .tflite file, or a .keras file, which takes seconds to load "
        "(default: models/model.tflite)",
    )
    parser.add_argument(
        "--threshold",
        type=probability,
        metavar="P",
        help="lowest P(male) that is labelled male (default: the model's own)",
    )
    parser.add_argument(
        "--abstain-below",
        type=probability,
        default=0.0,
        metavar="P",
        help="answer `uncertain` when the label has a probability below P (default: 0, never)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--largest", action="store_true", help="judge only the largest face of each image"
    )
    which.add_argument(
        "--whole",
        action="store_true",
        help="judge each whole image, even if the model was trained on faces cut out of theirs",
    )
    parser.add_argument(
        "--draw",
        type=folder_path,
        metavar="FOLDER",
        help="also write each image into this folder, as PNG, with boxes and labels",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object per line")
    form.add_argument("--csv", action="store_true", help="print CSV with a header")
    parser.set_defaults(run=predict)


def predict(args: argparse.Namespace) -> int:
    """Print a line for each image."""
    # NumPy starts these threads on import; they do linear algebra, which predicting does not need.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from facegender.inference.loading import load_predictors
    from facegender.inference.prediction import Prediction, predict_images

    unreadable: list[OSError] = []
    sources = find_sources(args.images, unreadable.append)
    for error in unreadable:
        print(f"{escape_controls(str(error.filename))}: {error.strerror}", file=sys.stderr)
    if args.draw:
        from facegender.cli.draw import check_folder

        check_folder(args.draw, sources)
    model = args.model or project_root() / "models" / "model.tflite"
    if args.model is None:
        print_doubt(project_root())
    predictions = predict_images(
        load_predictors(model, len(sources), trusted=args.model is None),
        sources,
        threshold=threshold_of(model) if args.threshold is None else args.threshold,
        abstain_below=args.abstain_below,
        faces="whole" if args.whole else "largest" if args.largest else "all",
    )
    if args.draw:
        from facegender.cli.draw import draw_predictions

        predictions = draw_predictions(predictions, sources, args.draw)
    failed = len(unreadable)
    if args.csv:
        # Names are data: they are UTF-8 in every locale, and other bytes are written unchanged.
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
        print(_csv_line(field.name for field in fields(Prediction)))
    with _line_printer(len(sources)) as print_line:
        for prediction in chain.from_iterable(predictions):
            failed += prediction.error is not None
            if args.json:
                line = json.dumps(asdict(prediction))
            elif args.csv:
                line = _csv_line(astuple(prediction))
            else:
                line = _text(prediction)
            is_plain_error = prediction.error is not None and not (args.json or args.csv)
            print_line(line, sys.stderr if is_plain_error else sys.stdout)
    return int(failed > 0)


def print_doubt(root: Path) -> None:
    """Print a note if the repository's model was trained on the sample, or in an earlier run."""
    if _is_unfinished(root / "dvc.lock"):
        why = "comes from an earlier run: `dvc repro` finishes the latest, which stopped"
    elif _is_sample(root / "data" / "raw.json"):
        why = "was trained only on the sample's cartoons: its labels for photos mean nothing"
    else:
        return
    print(f"note: model.tflite {why}", file=sys.stderr)


def _is_unfinished(lock: Path) -> bool:
    """Return whether dvc.lock has two digests of one path: a stage has not seen what is new."""
    try:
        digests = set(_DIGEST.findall(lock.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False
    return len(digests) > len({path for path, _ in digests})


def _is_sample(raw_info: Path) -> bool:
    """Return whether data/raw.json names the built-in sample; False if it cannot be read."""
    try:
        return bool(json.loads(raw_info.read_text())["source"] == "sample")
    except (OSError, ValueError, LookupError, TypeError):
        return False


def threshold_of(model: Path) -> float:
    """Return the threshold that a model carries, or 0.5, with a note on standard error."""
    from facegender.inference.threshold import read_threshold

    threshold = read_threshold(model)
    if threshold is None:
        print(f"{model.name} stores no threshold; using 0.5", file=sys.stderr)
        return 0.5
    return threshold


@contextmanager
def _line_printer(total: int) -> Iterator[Callable[[str, TextIO], None]]:
    """Yield a function that prints a line; it keeps a progress bar, if any, below the lines."""
    if total < BAR_FROM or not sys.stderr.isatty():
        yield lambda line, stream: print(line, file=stream)
        return
    # Imported here because it takes a fifth of the time of predicting one picture.
    from tqdm import tqdm

    with tqdm(total=total, unit="image", leave=False) as bar:

        def print_line(line: str, stream: TextIO) -> None:
            bar.update()
            bar.write(line, file=stream)

        yield print_line


def _text(prediction: "Prediction") -> str:
    image = escape_controls(prediction.image)
    if prediction.error is not None:
        return f"{image}: {escape_controls(prediction.error)}"
    if prediction.probability is None:
        return f"{prediction.label}  {image}"
    line = f"{prediction.label:<6}  P(male) = {prediction.probability:.4f}  "
    if prediction.score is not None:
        box = prediction.left, prediction.top, prediction.width, prediction.height
        left, top, width, height = (round(value or 0) for value in box)
        line += f"{width}x{height} at {left},{top}, score {prediction.score:.2f}  "
    return line + image


def _csv_line(values: Iterable[object]) -> str:
    buffer = io.StringIO()
    # The writer quotes only line breaks that contain a character of its own line terminator.
    csv.writer(buffer, lineterminator="\r\n").writerow(values)
    return buffer.getvalue().removesuffix("\r\n")


def find_sources(
    arguments: list[str], unreadable: Callable[[OSError], None]
) -> list[tuple[str, bytes | Path]]:
    """Return the name of each image, and its path, or its bytes if it is standard input.

    A file that is missing is among them, because the decoder says why it cannot be read.

    Args:
        arguments: files, folders, or `-`.
        unreadable: called with an error for each folder that cannot be searched or has no image.

    Raises:
        UserError: no argument names an image.
    """
    sources: list[tuple[str, bytes | Path]] = []
    nothing = []  # why an argument names no image
    for argument in arguments:
        if argument == "-":
            content = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
            if len(content) > MAX_STDIN_BYTES:
                raise UserError(f"Standard input has more than {MAX_STDIN_BYTES:,} bytes.")
            sources.append(("-", content))
        elif is_folder := _is_folder(argument):
            images, why_none = _search(argument, unreadable)
            sources += images
            if not images:
                nothing.append(why_none)
        else:
            sources.append((argument, Path(argument)))
            if is_folder is None:
                nothing.append(
                    f"There is no file or folder {argument or repr(argument)}. A relative path "
                    "starts at the current folder."
                )
    if len(nothing) == len(arguments):
        raise UserError(nothing[0])
    return sources


def _search(
    folder: str, unreadable: Callable[[OSError], None]
) -> tuple[list[tuple[str, bytes | Path]], str]:
    """Return a folder's images as `find_sources` does, and the message if it has none."""
    passed_over, errors = PassedOver(), list[OSError]()
    path = Path(folder)
    images = find_images(path, errors.append, passed_over)
    note = escape_controls(passed_over.text(folder))
    for error in errors:
        unreadable(error)
    if images:
        if note:
            print(note, file=sys.stderr)
    elif not errors:
        unreadable(OSError(errno.ENOENT, f"no image in this folder{note and f' ({note})'}", folder))
    reason = note or (errors[0].strerror if errors else "") or ""
    why_none = (
        f"There is no image in the folder {folder}{reason and f' ({reason})'}. Name another, or "
        "files."
    )
    return [(str(path / image), path / image) for image in images], why_none


def _is_folder(argument: str) -> bool | None:
    """Return whether an argument is a folder; None if there is neither file nor folder."""
    try:
        # `os.stat`, because `Path` takes an empty argument for this folder.
        return stat.S_ISDIR(os.stat(argument).st_mode)  # noqa: PTH116
    except PermissionError:
        return False
    except OSError:
        return None
