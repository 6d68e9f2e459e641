"""Two evaluations of the same images, joined image by image, and what prevents that."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from facegender.evaluation.groups import NO_METADATA, Chosen, Groups, find_groups
from facegender.labels import LABELS, NAMES


@dataclass(frozen=True)
class Results:
    """The results of one evaluation.

    Attributes:
        name: name in the report.
        metrics: result of `classification_metrics`.
        predictions: one row per test image: NO_METADATA and metadata columns; None if missing.
        costs: `size_*_bytes`, `latency_*_ms`, `training_images_per_second` and
            `training_seconds`, as far as recorded.
        commit: commit they come from; None for the work tree or a run.
    """

    name: str
    metrics: Mapping[str, Any]
    predictions: pd.DataFrame | None
    costs: Mapping[str, float]
    commit: str | None = None


def data_differences(candidate: Results, baseline: Results) -> list[str]:
    """Return what prevents an image-by-image comparison."""
    if missing := [one.name for one in (candidate, baseline) if one.predictions is None]:
        return [f"there are no predictions of {' and '.join(missing)}"]
    new, old = keyed(candidate.predictions), keyed(baseline.predictions)
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


def keyed(predictions: pd.DataFrame | None) -> pd.DataFrame:
    """Index predictions by the image's digest and its number among identical images."""
    if predictions is None:
        raise ValueError("no predictions")
    ordered = predictions.sort_values(["sha256", "path"])
    copy = ordered.groupby("sha256").cumcount()
    return ordered.set_index([ordered["sha256"].astype(str), copy])


def pair(
    candidate: Results, baseline: Results, chosen: Chosen = None
) -> tuple[pd.DataFrame, list[str]]:
    """Join the candidate's predictions with the baseline's.

    Metadata are the baseline's, so that a candidate cannot make a group disappear. Columns that
    only the candidate has are kept where `chosen` names the groups, or the baseline has no
    metadata. Elsewhere they would add groups, and all would be judged less sharply.

    Returns:
        Path, label, `probability` and `predicted` of the candidate, `old_probability`,
        `old_predicted` and metadata, sorted by path; and a sentence for each column of metadata
        that the candidate lacks or changed, and for those that do not count.
    """
    new, notes = with_metadata_of(candidate.predictions, baseline.predictions)
    pairs, old = keyed(new), keyed(baseline.predictions)
    added = [str(name) for name in pairs.columns if name not in old.columns]
    if added and chosen is None and len(old.columns) > len(NO_METADATA):
        pairs = pairs.drop(columns=added)
        notes.append(
            f"new in the metadata: {', '.join(added)}; groups of them are judged once a baseline "
            "has them, or evaluate.groups names them"
        )
    pairs = pairs.assign(old_probability=old["probability"], old_predicted=old["predicted"])
    return pairs.sort_values("path").reset_index(drop=True), notes


def with_metadata_of(
    new: pd.DataFrame | None, old: pd.DataFrame | None
) -> tuple[pd.DataFrame, list[str]]:
    """Return predictions with the metadata that older ones have of the same images.

    Args:
        new: predictions; they keep the metadata of images that only they have.
        old: older predictions.

    Returns:
        Predictions; and a sentence for each column that they lacked or had changed.
    """
    changed_to, before = keyed(new), keyed(old)
    shared = changed_to.index.isin(before.index)
    if not shared.any():  # other data, whose metadata have other columns
        return changed_to.reset_index(drop=True), []
    before = before.reindex(changed_to.index)
    result, notes = changed_to.copy(), []
    for column in before.columns.drop(list(NO_METADATA)):
        values = before[column].astype("string")
        if column not in changed_to.columns:
            notes.append(f"the metadata no longer has {column}: the baseline's is used")
            result[column] = before[column]
            continue
        now = changed_to[column].astype("string")
        same = now.eq(values).fillna(False) | (now.isna() & values.isna())
        if changed := int((shared & ~same).sum()):
            notes.append(f"{column} changed for {changed} images: the baseline's is used")
        result[column] = before[column].where(shared, changed_to[column])
    return result.reset_index(drop=True), notes


def find_known_groups(predictions: pd.DataFrame, chosen: Chosen, minimum: int) -> Groups:
    """Return the groups of `find_groups`; what the metadata lack is left out.

    Rules are the baseline's, whose metadata may have other columns.
    """
    asked = [(one,) if isinstance(one, str) else tuple(one) for one in chosen or ()]
    lacking = {name for pair in asked for name in pair}.difference(predictions.columns)
    if not lacking:
        return find_groups(predictions, chosen, minimum)
    known = [pair for pair in asked if lacking.isdisjoint(pair)]
    found = find_groups(predictions, known, minimum)
    sentence = f"the metadata lack {', '.join(sorted(lacking))}, which evaluate.groups names"
    return replace(found, left_out=[sentence, *found.left_out])


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
