"""Find labels that are probably wrong, and pictures that show little.

Confident learning (Northcutt, Jiang and Chuang, 2021: https://arxiv.org/abs/1911.00068), by
`cleanlab`: a classifier of the features of a frozen network judges each label without having seen
it. It leaves no image out: `data.exclude` does that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import laplace

from facegender.data.processed import ProcessedSplit
from facegender.evaluation.plots import face_grid
from facegender.params import Params
from facegender.runtime.output_capture import hide_native_notes

COLUMNS = ["path", "sha256", "split", "issue", "label", "probability", "quality"]
_INDEX = ["path", "label", "sha256"]
SHOWN = 20  # labels in the grid, and in the report
FOLDS = 5
# Limits of a picture, of luminance from 0 to 255.
MAX_DARK = 80  # its 99th percentile
MIN_BRIGHT = 240  # its 5th percentile
MIN_ENTROPY = 2.0  # bits of its histogram; flat drawings have 2.2 and more, photos 5.5 and more
MIN_SHARPNESS = 2.0  # standard deviation of its Laplacian
_STRENGTH = 0.003  # inverse regularisation (`C`) of the classifier
_BATCH = 32
_NO_WEIGHTS = (
    "model.weights is none, and a network trained on these labels cannot judge them; use "
    "`facegender audit-labels --weights imagenet`"
)


@dataclass(frozen=True)
class Audit:
    """Findings about labels and pictures.

    Attributes:
        issues: columns COLUMNS: suspect labels, the worst first, and then pictures that show
            little; an image with both is listed twice.
        accuracy: share of labels that the classifier gives out of fold; None if it judged none.
        not_judged: why labels were not judged; None if they were.
    """

    issues: pd.DataFrame
    images: int
    accuracy: float | None
    not_judged: str | None

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of images by issue."""
        return {
            str(name): int(count)
            for name, count in self.issues["issue"].value_counts().sort_index().items()
        }

    def summary(self) -> str:
        """Return the number of images by issue, and why labels were not judged."""
        found = ", ".join(f"{name} {count}" for name, count in self.counts.items()) or "no issues"
        not_judged = f"; labels are not judged: {self.not_judged}" if self.not_judged else ""
        return f"{found}, of {self.images} images{not_judged}"


def worst_labels(issues: pd.DataFrame) -> pd.DataFrame:
    """Return the SHOWN labels that are most probably wrong, of a table of issues."""
    return issues[issues["issue"] == "label"].head(SHOWN)


def audit(splits: Mapping[str, ProcessedSplit], params: Params, groups: Mapping[str, str]) -> Audit:
    """Judge all labels and pictures.

    Args:
        groups: the group of images that show one picture or person, by path, from
            `splits.read_shared_groups`; other images are alone.

    Raises:
        UserError: the weights cannot be read.
    """
    features = None if params.model.weights == "none" else extract_features(splits, params)
    return find_issues(splits, features, groups, seed=params.split.seed)


def extract_features(splits: Mapping[str, ProcessedSplit], params: Params) -> np.ndarray:
    """Return a frozen network's features of all images, split by split: float32 (n, k).

    Raises:
        UserError: the weights cannot be read.
    """
    with hide_native_notes():
        import keras
        import tensorflow as tf

        from facegender.model.network import build_network

    keras.utils.set_random_seed(params.split.seed)
    tf.config.experimental.enable_op_determinism()
    network = build_network(
        image_size=params.image.size,
        alpha=params.model.alpha,
        weights=params.model.weights,
        weights_sha256=params.model.weights_sha256,
        dropout=0.0,
        batch_norm="frozen",
        batch_norm_momentum=0.99,
        seed=params.split.seed,
    )
    extract = network.features()
    return np.concatenate(
        [
            extract.predict_on_batch(batch)
            for split in splits.values()
            for batch in split.batches(_BATCH)
        ]
    )


def find_issues(
    splits: Mapping[str, ProcessedSplit],
    features: np.ndarray | None,
    groups: Mapping[str, str],
    *,
    seed: int,
) -> Audit:
    """Judge labels by what `extract_features` returns, unless it is None, and judge pictures."""
    images = pd.concat(
        # Without metadata, which may have columns of the names below.
        [split.index[_INDEX].assign(split=name) for name, split in splits.items()],
        ignore_index=True,
    )
    labels = images["label"].to_numpy(dtype=np.int64)
    group = [groups.get(*names) for names in images[["path", "sha256"]].to_numpy()]
    least = int(pd.Series(group).groupby(labels).nunique().min())
    suspects, accuracy, not_judged = images[:0].assign(issue=""), None, None
    if features is None:
        not_judged = _NO_WEIGHTS
    elif least < FOLDS:
        not_judged = f"a label has {least} different pictures or persons, fewer than {FOLDS}"
    else:
        judged = judge_labels(features, labels, group, seed=seed)
        accuracy = float(((judged["probability"] >= 0.5) == labels).mean())
        images = images.join(judged.round(4))
        suspects = images[images["suspect"]].assign(issue="label").sort_values(["quality", "path"])
    images["issue"] = [
        judge_picture(image)
        for split in splits.values()
        for batch in split.batches(_BATCH)
        for image in batch
    ]
    poor = images[images["issue"] != ""].sort_values(["issue", "path"])
    issues = pd.concat([suspects, poor], ignore_index=True).reindex(columns=COLUMNS)
    return Audit(issues, len(images), accuracy, not_judged)


def draw_worst(splits: Mapping[str, ProcessedSplit], found: Audit, path: Path) -> None:
    """Draw the labels that are most probably wrong as a PNG, or a title that says why not."""
    worst = worst_labels(found.issues)
    title = "Labels that are probably wrong, the worst first"
    if worst.empty:
        title = "Labels are not judged" if found.not_judged else "No label is suspect"
    face_grid(
        _pictures(splits, worst),
        worst["label"].to_numpy(),
        worst["probability"].to_numpy(),
        title,
        path,
        threshold=0.5,
    )


def _pictures(splits: Mapping[str, ProcessedSplit], issues: pd.DataFrame) -> np.ndarray:
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
        seed: random seed of the folds.

    Returns:
        Columns `probability` (of label 1, out of fold), `quality` (of the label: 0 worst, 1 best)
        and `suspect` (bool), with a row for each image.

    Raises:
        ValueError: fewer groups of a label than FOLDS.
    """
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=_STRENGTH, max_iter=1000))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    # One thread: several wait for each other on a busy machine, and may add in another order.
    with threadpool_limits(1):
        male = cross_val_predict(
            classifier, features, labels, groups=groups, cv=folds, method="predict_proba"
        )[:, 1]
    both = np.stack([1 - male, male], axis=1)
    return pd.DataFrame(
        {
            "probability": male,
            "quality": get_label_quality_scores(labels, both),
            "suspect": find_label_issues(labels, both, n_jobs=1),
        }
    )


def judge_picture(image: np.ndarray) -> str:
    """Return the fault of a uint8 RGB picture: dark, bright, low_information, blurred or ""."""
    picture = Image.fromarray(image).convert("L")
    grey = np.asarray(picture).astype(np.int16)
    faults = {
        "dark": np.percentile(grey, 99) < MAX_DARK,
        "bright": np.percentile(grey, 5) > MIN_BRIGHT,
        "low_information": picture.entropy() < MIN_ENTROPY,
        "blurred": laplace(grey)[1:-1, 1:-1].std() < MIN_SHARPNESS,
    }
    return next((name for name, found in faults.items() if found), "")
