"""Compare recipes on your own photos, by repeated k-fold over the training split.

The pipeline's own code checks and divides the class folders. The bench then folds the training
split (train and validation together) by groups of near duplicates. For each fold it trains every
candidate on the other folds, with a validation split of its own, and judges it on the fold that was
held out. A candidate is a list of changes as for `-S`, or `notebook` (bench/notebook.py), which
learns from the validation split too. The others are compared with the first one, image by image.
The test split stays untouched until --test, which trains the first candidate and the one with the
lowest log loss on the whole training split, and judges them on the test split. Do this once, at the
end: a second look would help to choose.

Intervals hold for other photos of the same kind, and count near duplicates as one
(`python -m bench.interval_coverage`). They include the randomness of folds and seeds only as far as
--repeats shows it. The best of many candidates looks better than it is: trust --test.

Each training runs in its own process and leaves its model and probabilities in --results, where the
next run finds them. You can stop at any time, even during a training, and resume.

--transfer also judges each of those models on all images of another folder, which none of them has
seen. The mean is over images and trainings; the interval counts each image once. A candidate with
image.face=crop learns from faces that are cut out, and judges those. --groups names columns of that
folder's metadata, such as ages, by which accuracy and recalls are shown too.

    python -m bench.recipes --folder ../shared/photos --results DIR \
      --weights ../shared/weights/mobilenet_1_0_224_tf_no_top.h5 \
      -S "recipe=best" -S "recipe=best train.epochs=12 train.small_epochs=8" -S "recipe=fast"
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import t as student
from sklearn.model_selection import StratifiedGroupKFold

from facegender.data import checks
from facegender.data.face_table import find_all_faces, read_faces
from facegender.data.fingerprint_store import fingerprint_images
from facegender.data.manifest import write_table
from facegender.data.preprocessing import write_split
from facegender.data.processed import ProcessedSplit
from facegender.data.raw_manifest import build_manifest
from facegender.errors import UserError
from facegender.evaluation.groups import group_metrics
from facegender.evaluation.metrics import (
    expected_calibration_error,
    paired_interval,
    wilson_interval,
)
from facegender.faces.settings import crop_of
from facegender.params import Image, Params, load_params
from facegender.runtime.entry_points import run_command
from tools.compose_params import compose

if TYPE_CHECKING:
    import keras

# For fewer, the intervals cover more than they claim (`python -m bench.interval_coverage`).
FEWEST_GROUPS = 100
NOTEBOOK = "notebook"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="class folders")
    parser.add_argument("--results", type=Path, required=True, help="where to keep each training")
    parser.add_argument("--weights", default="imagenet", help="imagenet, or a file (imagenet)")
    parser.add_argument("-S", dest="candidates", action="append", help="changes of a candidate")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="times to fold (1)")
    parser.add_argument("--only", type=int, help="run only this many folds of each repeat")
    parser.add_argument("--test", action="store_true", help="judge on the test split, at the end")
    parser.add_argument("--transfer", type=Path, help="other class folders to judge on")
    parser.add_argument("--groups", nargs="+", help="show --transfer by these columns")
    parser.add_argument("--seed", type=int, default=0, help="of the folds (0)")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        (train_notebook if args.candidates == [NOTEBOOK] else train)(args.run)
        return

    candidates = args.candidates or ["recipe=best"]
    params = {
        change: compose_candidate(args.results, change, args.weights) for change in candidates
    }
    first = params[candidates[0]]
    if any((p.data, p.split) != (first.data, first.split) for p in params.values()):
        raise UserError("Candidates that differ in data or split need separate runs.")
    images = divide_images(args.folder, first)
    seen = images[images["split"] != "test"].reset_index(drop=True)
    folds = [
        fold
        for repeat in range(args.repeats)
        for fold in fold_images(seen, first, args.folds, args.seed + repeat)[: args.only]
    ]
    print(f"{len(seen)} images in {seen['group'].nunique()} groups, {len(folds)} trainings each")

    def judge(change: str, parts: list[pd.DataFrame]) -> pd.DataFrame:
        pixels = decode_images(images, args.folder, args.results, params[change].image)
        notebook = change == NOTEBOOK
        return pd.concat(
            [run(args.results, params[change], part, pixels, notebook=notebook) for part in parts]
        )

    judged = {}
    for change in candidates:
        judged[change] = judge(change, folds).reset_index(drop=True)
        show(change, judged[change])
        if change != candidates[0]:
            compare(judged[change], judged[candidates[0]])
    if args.transfer:
        other = divide_images(args.transfer, first)
        print(f"{len(other)} images of {args.transfer}")
        moved = {}
        for change, rows in judged.items():
            pixels = decode_images(other, args.transfer, args.results, params[change].image)
            trainings = dict(zip(rows["training"], rows["seconds"], strict=True))
            moved[change] = transfer(args.results, trainings, pixels)
            show(f"{change}, on {args.transfer.name}", moved[change])
            show_groups(moved[change], args.groups)
            if change != candidates[0]:
                compare(moved[change], moved[candidates[0]])
    if args.test:
        best = min(judged, key=lambda change: float(judged[change]["loss"].mean()))
        last = {change: judge(change, [images]) for change in dict.fromkeys([candidates[0], best])}
        for change, rows in last.items():
            show(f"test split, {change}", rows)
        if best != candidates[0]:
            compare(last[best], last[candidates[0]])


def compose_candidate(folder: Path, change: str, weights: str) -> Params:
    folder.mkdir(parents=True, exist_ok=True)
    composed = folder / "params.yaml"
    # The notebook takes the study's size, as recipe paper does.
    changes = ["recipe=paper"] if change == NOTEBOOK else change.split()
    compose(composed, f"model.weights={weights}", *changes)
    return load_params(composed)


def divide_images(folder: Path, params: Params) -> pd.DataFrame:
    """Check and divide the images as the stage does.

    Returns:
        The manifest of all splits, with `split` and `group` (of near duplicates).
    """
    manifest = build_manifest(folder, **params.split.classes.model_dump())
    splits, _ = checks.clean(manifest, folder, params.data, params.split)
    images = pd.concat([part.assign(split=name) for name, part in splits.items()])
    images = images.reset_index(drop=True)
    groups = checks.find_duplicate_groups(
        images, fingerprint_images(images, folder), checks.Findings({})
    )
    return images.assign(group=images["path"].map(groups))


def decode_images(
    images: pd.DataFrame, folder: Path, results: Path, image: Image
) -> ProcessedSplit:
    """Return all images decoded, cut out and resized, from --results if they are there."""
    crop = crop_of(image)
    if crop and (image.crop.jitter or image.crop.boxes):
        raise UserError("image.crop.jitter and image.crop.boxes are not supported here.")
    which = digest(images.to_csv(), image.model_dump_json()) if crop else digest(images.to_csv())
    processed = results / f"images-{image.size}-{which}"
    if not processed.exists():
        with tempfile.TemporaryDirectory(dir=results) as temporary:
            faces = None
            if crop:
                table = find_all_faces(images, folder, crop)
                print(f"{(table['faces'] == 0).sum()} of {len(table)} have no face: taken whole")
                write_table(table, Path(temporary) / "faces.csv")
                faces = read_faces(Path(temporary) / "faces.csv")
            name = f"{image.size} pixels"
            target = Path(temporary) / "all"
            write_split(images, folder, target, size=image.size, name=name, crop=crop, faces=faces)
            target.rename(processed)
    return ProcessedSplit(processed)


def fold_images(seen: pd.DataFrame, params: Params, folds: int, seed: int) -> list[pd.DataFrame]:
    """Return, by fold, the images with their `split`: train, validation, or test if held out."""

    def folded(images: pd.DataFrame, number: int) -> list[np.ndarray]:
        folder = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
        return [held for _, held in folder.split(images, images["label"], images["group"])]

    result = []
    for held in folded(seen, folds):
        fold = seen.assign(split="train")
        fold.loc[held, "split"] = "test"
        rest = fold[fold["split"] == "train"]
        validation = folded(rest, round(1 / params.split.validation_fraction))[0]
        fold.loc[rest.index[validation], "split"] = "validation"
        result.append(fold)
    return result


def run(
    results: Path, params: Params, fold: pd.DataFrame, pixels: ProcessedSplit, *, notebook: bool
) -> pd.DataFrame:
    """Train on a fold in a new process, unless --results has it already.

    Returns:
        The images of the fold's test split, with `probability`, `loss` and `seconds` of training.
    """
    used = params.model_dump_json(include={"image", "model", "train"}) + NOTEBOOK * notebook
    folder = results / digest(used, fold[["sha256", "label", "split"]].to_csv())
    if not all((folder / name).exists() for name in ("model.keras", "done.json")):
        table = fold.merge(pixels.index[["path", "row"]], on="path")
        for name, part in table.groupby("split"):
            (folder / str(name)).mkdir(parents=True, exist_ok=True)
            write_table(part, folder / str(name) / "index.csv")
            link = folder / str(name) / "images.npy"
            link.unlink(missing_ok=True)
            link.symlink_to((pixels.directory / "images.npy").resolve())
        (folder / "params.json").write_text(params.to_json())
        command = [sys.executable, "-m", "bench.recipes", "--run", str(folder)]
        command += ["--folder", "-", "--results", "-", *(["-S", NOTEBOOK] if notebook else [])]
        subprocess.run(command, check=True)
    done = json.loads((folder / "done.json").read_text())
    test = ProcessedSplit(folder / "test").index
    rows = with_loss(test, np.array(done["probabilities"]))
    return rows.assign(training=folder.name, seconds=done["seconds"])


def with_loss(images: pd.DataFrame, probability: np.ndarray) -> pd.DataFrame:
    of_label = np.where(images["label"] == 1, probability, 1 - probability)
    return images.assign(probability=probability, loss=-np.log(np.clip(of_label, 1e-7, 1)))


def transfer(results: Path, trainings: dict[str, float], pixels: ProcessedSplit) -> pd.DataFrame:
    """Judge models on images of another folder.

    Args:
        results: the folder that holds each training.
        trainings: seconds of each training, by name.
        pixels: images of the other folder, decoded, with `group` in the index.

    Returns:
        The images once for each model, in the columns that `run` returns.
    """
    from facegender.model.saved_model import load_model, predict_arrays

    return pd.concat(
        [
            with_loss(
                pixels.index,
                predict_arrays(load_model(results / name / "model.keras"), pixels.batches(32)),
            ).assign(training=name, seconds=seconds)
            for name, seconds in trainings.items()
        ],
        ignore_index=True,
    )


def train(folder: Path) -> None:
    """Train as the stage does, and write done.json, with probabilities of the test split.

    An interrupted training resumes after its last epoch; its seconds are then unknown, NaN.
    """
    from facegender.training import train as training
    from facegender.training.calibration import calibrate
    from facegender.training.checkpoints import Checkpoint

    params = Params.model_validate_json((folder / "params.json").read_text())
    parts = {name: ProcessedSplit(folder / name) for name in ("train", "validation", "test")}
    network = training.new_network(params)
    checkpoint = Checkpoint(folder / "checkpoint.npz")
    start = time.perf_counter() if checkpoint.saved is None else math.nan
    result = training.train_network(
        network, parts["train"], parts["validation"], params.train, checkpoint=checkpoint, verbose=0
    )
    slope, intercept = (
        calibrate(network, parts["validation"]) if params.train.calibrate else (1.0, 0.0)
    )
    seconds = time.perf_counter() - start
    result.history.to_csv(folder / "history.csv", index=False)
    result.speed.to_csv(folder / "speed.csv", index=False)
    done = {"seconds": seconds, "slope": slope, "intercept": intercept}
    write_results(folder, network.inference(slope, intercept), parts["test"], done)
    checkpoint.remove()


def train_notebook(folder: Path) -> None:
    """Train the study's notebook, and write done.json as `train` does; it cannot resume."""
    from bench import notebook

    params = Params.model_validate_json((folder / "params.json").read_text())
    parts = {name: ProcessedSplit(folder / name) for name in ("train", "validation", "test")}
    seconds = 0.0

    def report(epoch: int, passed: float, _: float) -> None:
        nonlocal seconds
        seconds = passed
        print(f"notebook {epoch}/{notebook.EPOCHS} at {passed:.0f} s", file=sys.stderr, flush=True)

    model = notebook.train(parts, params.model.weights, on_epoch=report)
    # Not calibrated.
    done = {"seconds": seconds, "slope": 1.0, "intercept": 0.0}
    write_results(folder, model, parts["test"], done)


def write_results(
    folder: Path, model: "keras.Model", test: ProcessedSplit, done: dict[str, float]
) -> None:
    """Write the model, and `done` with the probabilities of the test split to done.json."""
    from facegender.model.saved_model import predict_arrays, save_model

    probabilities = predict_arrays(model, test.batches(32)).tolist()
    save_model(model, folder / "model.keras")
    (folder / "done.json").write_text(json.dumps({**done, "probabilities": probabilities}))


def figure(
    interval: Callable[[np.ndarray, pd.Series], tuple[float, float]],
    values: np.ndarray,
    groups: pd.Series,
    form: str = ".4f",
) -> str:
    """Return a mean and its 95 % interval, or why there is none."""
    mean = f"{values.mean():{form}}"
    if (count := groups.nunique()) < FEWEST_GROUPS:
        return f"{mean} (no interval from {count} groups)"
    low, high = interval(values, groups)
    return f"{mean} ({low:{form}} to {high:{form}})"


def share_interval(correct: np.ndarray, groups: pd.Series) -> tuple[float, float]:
    """Return the 95 % interval of the mean of zeros and ones: Wilson's for a grouped sample."""
    share = float(correct.mean())
    n = _effective_number(share * (1 - share), correct, groups)
    return wilson_interval(share * n, n)


def share_difference_interval(change: np.ndarray, groups: pd.Series) -> tuple[float, float]:
    """Return the 95 % interval of a difference of two shares: Tango's for a grouped sample.

    Args:
        change: 1 where only the new model is right, -1 where only the old one is, 0 elsewhere.
    """
    gained, lost = float((change > 0).mean()), float((change < 0).mean())
    n = _effective_number(gained + lost - (gained - lost) ** 2, change, groups)
    return paired_interval(gained * n, lost * n, n)


def mean_interval(values: np.ndarray, groups: pd.Series) -> tuple[float, float]:
    """Return the 95 % interval of a mean, by Student's t over the sums of groups."""
    reach = float(student.ppf(0.975, groups.nunique() - 1)) * _standard_error(values, groups)
    mean = float(values.mean())
    return mean - reach, mean + reach


def _effective_number(variance: float, values: np.ndarray, groups: pd.Series) -> float:
    """Return how many independent values of that variance have the standard error of these.

    Korn and Graubard, Confidence intervals for proportions with small expected number of positive
    counts estimated from survey data, Survey Methodology 1998.
    """
    error = _standard_error(values, groups)
    return variance / error**2 if error else float(groups.nunique())


def _standard_error(values: np.ndarray, groups: pd.Series) -> float:
    residuals = pd.Series(values - values.mean(), index=groups.index).groupby(groups).sum()
    count = len(residuals)
    return math.sqrt(count / (count - 1) * float((residuals**2).sum())) / len(values)


def right(table: pd.DataFrame) -> np.ndarray:
    return ((table["probability"] >= 0.5) == table["label"]).to_numpy(dtype=float)


def show(name: str, table: pd.DataFrame) -> None:
    """Print a candidate's metrics over all held-out images, and the seconds of its trainings."""
    accuracy = figure(share_interval, right(table), table["group"])
    ece = expected_calibration_error(table["label"].to_numpy(), table["probability"].to_numpy())
    seconds = table.groupby("training")["seconds"].first()
    print(
        f"{name}: accuracy {accuracy}, log loss {table['loss'].mean():.4f}, ece {ece:.4f},"
        f" seconds {seconds.mean():.0f} ({seconds.min():.0f} to {seconds.max():.0f})",
        flush=True,
    )


def show_groups(table: pd.DataFrame, names: list[str] | None) -> None:
    """Print accuracy and recalls by group of the metadata columns; `n` counts answers."""
    if names:
        found = group_metrics(table, threshold=0.5, minimum=1, chosen=names)
        shown = found[["column", "group", "n", "accuracy", "recall_female", "recall_male"]]
        print(shown.to_string(index=False, float_format="%.4f", na_rep="-"), flush=True)


def compare(table: pd.DataFrame, first: pd.DataFrame) -> None:
    """Print the mean difference of a candidate from the first, image by image."""
    loss, correct = (table["loss"] - first["loss"]).to_numpy(), right(table) - right(first)
    log_loss = figure(mean_interval, loss, table["group"], "+.4f")
    accuracy = figure(share_difference_interval, correct, table["group"], "+.4f")
    print(f"  less the first: log loss {log_loss}, accuracy {accuracy}", flush=True)


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


if __name__ == "__main__":
    run_command(main)
