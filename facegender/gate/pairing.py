"""Two evaluations of the same images, joined image by image, and what prevents that."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from facegender.evaluation.groups import NO_METADATA
from facegender.labels import LABELS, NAMES


@dataclass(frozen=True)
class Results:
    """The results of one evaluation.

    Attributes:
        name: name in the report.
        metrics: result of `classification_metrics`.
        predictions: one row per test image: NO_METADATA and metadata columns; None if
            missing.
        costs: `size_*_bytes`, `latency_*_ms`, `training_images_per_second` and
            `training_seconds`, as far as recorded.
    """

    name: str
    metrics: Mapping[str, Any]
    predictions: pd.DataFrame | None
    costs: Mapping[str, float]


def data_differences(candidate: Results, baseline: Results) -> list[str]:
    """Return what prevents an image-by-image comparison."""
    if missing := [one.name for one in (candidate, baseline) if one.predictions is None]:
        return [f"there are no predictions of {' and '.join(missing)}"]
    new, old = _keyed(candidate.predictions), _keyed(baseline.predictions)
    shared = new.index.intersection(old.index)
    found = []
    if not len(new) == len(old) == len(shared):
        found.append(
            f"the test sets differ: {len(new)} images in {candidate.name}, {len(old)} in "
            f"{baseline.name}, {len(shared)} in both"
        )
    relabelled = int((new.loc[shared, "label"] != old.loc[shared, "label"]).sum())
    if relabelled and relabelled == len(shared):
        found.append("the label mapping differs: each image in both has the other label")
    elif relabelled:
        found.append(f"the labels differ: {relabelled} of {len(shared)} images have the other one")
    return found


def _keyed(predictions: pd.DataFrame | None) -> pd.DataFrame:
    """Index predictions by the image's digest and its number among identical images."""
    if predictions is None:
        raise ValueError("no predictions")
    ordered = predictions.sort_values(["sha256", "path"])
    copy = ordered.groupby("sha256").cumcount()
    return ordered.set_index([ordered["sha256"].astype(str), copy])


def pair(candidate: Results, baseline: Results) -> tuple[pd.DataFrame, list[str]]:
    """Join the candidate's predictions with the baseline's.

    Metadata are the baseline's, so that a candidate cannot make a group disappear; columns that
    only the candidate has are kept.

    Returns:
        Path, label, `probability` and `predicted` of the candidate, `old_probability`,
        `old_predicted` and metadata, sorted by path; and a sentence for each column of metadata
        that the candidate lacks or changed.
    """
    new, old = _keyed(candidate.predictions), _keyed(baseline.predictions)
    old = old.reindex(new.index)
    pairs = new.assign(old_probability=old["probability"], old_predicted=old["predicted"])
    notes = []
    for column in old.columns.drop(list(NO_METADATA)):
        if column not in new.columns:
            notes.append(f"the metadata no longer has {column}: the baseline's is used")
        else:
            same = new[column].astype("string").eq(old[column].astype("string"))
            both = new[column].isna() & old[column].isna()
            if changed := int((~(same.fillna(False) | both)).sum()):
                notes.append(f"{column} changed for {changed} images: the baseline's is used")
        pairs[column] = old[column]
    return pairs.sort_values("path").reset_index(drop=True), notes


def changed_predictions(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the images whose prediction changed, newly wrong ones first."""
    flipped = pairs[pairs["predicted"] != pairs["old_predicted"]]
    columns = ["path", "label", "old_probability", "new_probability", "right"]
    return (
        flipped.assign(
            label=flipped["label"].map(NAMES),
            new_probability=flipped["probability"],
            right=flipped["predicted"] == flipped["label"],
        )[columns]
        .sort_values(["right", "path"])
        .reset_index(drop=True)
    )


def count_right(predictions: pd.DataFrame) -> tuple[int, int]:
    """Return the number of correct predictions, and of all."""
    return int((predictions["label"] == predictions["predicted"]).sum()), len(predictions)


def right_by_label(results: Results) -> dict[str, tuple[int, int]] | None:
    """Return the number of correct predictions and of images for each label."""
    try:
        confusion = results.metrics["confusion"]
        return {
            name: (
                int(confusion[f"{name}_as_{name}"]),
                sum(int(confusion[f"{name}_as_{guess}"]) for guess in LABELS),
            )
            for name in LABELS
        }
    except (LookupError, TypeError, ValueError):
        return None
