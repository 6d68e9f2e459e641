"""Which labels are probably wrong, and which pictures show little.

Confident learning (Northcutt, Jiang and Chuang, 2021: https://arxiv.org/abs/1911.00068), by
`cleanlab`: a classifier of the features of a frozen network judges each label without having seen
it. Nothing is left out by it: `data.exclude` does that.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from facegender.data.alignment import LUMA
from facegender.data.processed import ProcessedSplit
from facegender.errors import UserError
from facegender.params import Params

COLUMNS = ["path", "sha256", "split", "issue", "label", "probability", "quality"]
FOLDS = 5
# Limits of a picture, of luminance from 0 to 255.
MAX_DARK = 80  # its 99th percentile
MIN_BRIGHT = 240  # its 5th percentile
MIN_ENTROPY = 3.0  # bits of its histogram; a photo has 6 to 8
MIN_SHARPNESS = 2.0  # standard deviation of its Laplacian
_STRENGTH = 0.003  # of the classifier, inverse of its regularisation (`C`)
_BATCH = 32


def extract_features(splits: Mapping[str, ProcessedSplit], params: Params) -> np.ndarray:
    """Return what a frozen network makes of all images, split by split: float32 (n, k).

    Args:
        splits: processed images.
        params: name the weights, and the image's size.

    Raises:
        UserError: `model.weights` is none, which knows nothing of faces, or cannot be read.
    """
    if params.model.weights == "none":
        raise UserError(
            "The label audit needs a network that was trained on other data: choose one with "
            "model.weights, as `dvc exp run -S recipe=best` does."
        )
    from facegender.training.train import new_network

    extract = new_network(params).features()
    return np.concatenate(
        [
            extract.predict_on_batch(batch)
            for split in splits.values()
            for batch in split.batches(_BATCH)
        ]
    )


def find_issues(
    splits: Mapping[str, ProcessedSplit],
    features: np.ndarray,
    *,
    group_by: str | None,
    seed: int,
) -> pd.DataFrame:
    """List suspect labels, the worst first, and then pictures that show little.

    Args:
        splits: processed images.
        features: result of `extract_features`.
        group_by: column of what must not be in several folds; else files with the same bytes.
        seed: source of chance of the folds.

    Returns:
        The columns COLUMNS; an image with two issues is there twice.

    Raises:
        ValueError: too few images, as `judge_labels` says.
    """
    images = pd.concat(
        [split.index.assign(split=name) for name, split in splits.items()], ignore_index=True
    )
    groups = images["sha256"]
    if group_by is not None:
        groups = images[group_by].fillna(groups)
    labels = images["label"].to_numpy(dtype=np.int64)
    images = images.join(judge_labels(features, labels, list(groups), seed=seed).round(4))
    suspects = images[images["suspect"]].assign(issue="label").sort_values(["quality", "path"])
    faults = (judge_pictures(split.batches(_BATCH)) for split in splits.values())
    images["issue"] = [fault for split in faults for fault in split]
    poor = images[images["issue"] != ""].sort_values(["issue", "path"])
    return pd.concat([suspects, poor], ignore_index=True)[COLUMNS]


def pictures(splits: Mapping[str, ProcessedSplit], issues: pd.DataFrame) -> np.ndarray:
    """Return the images of rows of `find_issues`: uint8 (n, size, size, 3)."""
    read = []
    for name, path in issues[["split", "path"]].to_numpy():
        split = splits[name]
        read.append(split.read(np.flatnonzero(split.index["path"] == path)[:1])[0])
    size = next(iter(splits.values())).images.shape[1:]
    return np.stack(read) if read else np.empty((0, *size), np.uint8)


def judge_labels(
    features: np.ndarray, labels: np.ndarray, groups: Sequence[str], *, seed: int
) -> pd.DataFrame:
    """Judge each label by a classifier that was fitted without its group.

    Args:
        features: float (n, k), of a network that has not learned from `labels`.
        labels: int (n,), 0 or 1.
        groups: group of each image, (n,); a group, such as a person, stays in one fold.
        seed: source of chance of the folds.

    Returns:
        Columns `probability` (of label 1, out of fold), `quality` (of the label: 0 worst, 1 best)
        and `suspect` (bool), with a row for each image.

    Raises:
        ValueError: fewer groups of a label than FOLDS.
    """
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    male = np.empty(len(labels))
    for rest, fold in folds.split(features, labels, groups):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=_STRENGTH, max_iter=1000))
        # One thread: more wait for one another on a busy machine, and may add in another order.
        with threadpool_limits(1):
            classifier.fit(features[rest], labels[rest])
        male[fold] = classifier.predict_proba(features[fold])[:, 1]
    both = np.stack([1 - male, male], axis=1)
    return pd.DataFrame(
        {
            "probability": male,
            "quality": get_label_quality_scores(labels, both),
            "suspect": find_label_issues(labels, both, n_jobs=1),
        }
    )


def judge_pictures(batches: Iterable[np.ndarray]) -> list[str]:
    """Return what is wrong with each picture: dark, bright, low_information, blurred or nothing.

    Args:
        batches: uint8 RGB (n, height, width, 3).
    """
    return [_picture_issue(image) for batch in batches for image in batch]


def _picture_issue(image: np.ndarray) -> str:
    grey = image @ LUMA
    counts = np.bincount(grey.astype(np.uint8).ravel(), minlength=256)
    share = counts[counts > 0] / grey.size
    sharpness = (
        4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    ).std()
    faults = {
        "dark": np.percentile(grey, 99) < MAX_DARK,
        "bright": np.percentile(grey, 5) > MIN_BRIGHT,
        "low_information": -(share * np.log2(share)).sum() < MIN_ENTROPY,
        "blurred": sharpness < MIN_SHARPNESS,
    }
    return next((name for name, found in faults.items() if found), "")
