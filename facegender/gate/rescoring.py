"""Score the baseline's stored model on the candidate's test images if the test sets differ.

Two models are best compared on the same images. The pictures come from the raw data, each checked
against the SHA-256 in the candidate's predictions. The present code decodes them, with the size and
crop of the baseline's model.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from scipy.stats import fisher_exact

from facegender.data.decode_rows import check_file
from facegender.data.face_images import face_images
from facegender.data.images import InvalidImage
from facegender.data.manifest import read_manifest
from facegender.data.parallel_tasks import run_tasks
from facegender.errors import UserError
from facegender.evaluation.metrics import classification_metrics
from facegender.faces.settings import FaceCrop
from facegender.files import file_sha256
from facegender.gate.pairing import Results, keyed, with_metadata_of
from facegender.inference.litert import load_litert
from facegender.inference.threshold import read_threshold
from facegender.runtime.git import read_yaml
from facegender.runtime.integrity import recorded_outs
from facegender.runtime.stored_objects import stored_directory, stored_file

_CHUNK = 64  # images a task
_ALONE = 500  # images up to which starting processes takes longer than it saves
# The validation split chooses the model's epoch and calibration.
_LEARNT_FROM = ("train.csv", "validation.csv")


@dataclass(frozen=True)
class StoredModel:
    """A model to score again.

    Attributes:
        path: `.tflite` file.
        threshold: P(male) from which it labels an image male, if the file does not say.
        seen: SHA-256 of the images that it was trained or validated on; None if unknown.
        unknown: why they are unknown, as a clause.
    """

    path: Path
    threshold: float
    seen: frozenset[str] | None
    unknown: str = ""


@dataclass(frozen=True)
class Rescored:
    """Two models on the candidate's test images.

    Attributes:
        candidate: the candidate's results; metadata of images in both test sets are the baseline's.
        compared: the same, on the images that neither model has seen in training.
        baseline: the baseline's results on those.
        notes: what was done and left out, one sentence each.
        questions: reasons why somebody must accept the new test set, one sentence each.
    """

    candidate: Results
    compared: Results
    baseline: Results
    notes: list[str]
    questions: list[str]


def model_of_commit(root: Path, commit: str, paths: Mapping[str, str]) -> StoredModel:
    """Return the model that dvc.lock of a commit records.

    Args:
        paths: paths of the pipeline's files in dvc.yaml of the commit.

    Raises:
        UserError: it records none, or neither DVC's cache nor the default remote has it.
    """
    md5 = _recorded(root, commit).get(paths.get("float32", ""))
    if md5 is None:
        raise UserError(f"dvc.lock of {commit[:10]} records no model")
    try:
        path = stored_file(root, md5)
    except UserError as error:
        raise UserError(
            f"its model is unavailable: {error}. `dvc push` where it was made sends it to a remote"
        ) from error
    evaluate = (read_yaml(root, "params.yaml", commit) or {}).get("evaluate", {})
    try:
        seen, unknown = images_seen(root, commit, paths), ""
    except UserError as error:
        seen, unknown = None, str(error)
    return StoredModel(path, float(evaluate.get("threshold", 0.5)), seen, unknown)


def images_seen(
    root: Path,
    commit: str | None,
    paths: Mapping[str, str],
    digests: Collection[str] | None = None,
) -> frozenset[str]:
    """Return the SHA-256 of the images in the training and validation splits.

    Args:
        commit: commit whose dvc.lock records the manifests; None for the work tree.
        digests: beginnings of the manifests' SHA-256, to check that they are the right ones.

    Raises:
        UserError: the manifests are unavailable, or those of another run.
    """
    splits = paths.get("splits", "")
    md5 = _recorded(root, commit).get(splits)
    if md5 is None:
        raise UserError("dvc.lock records no manifests")
    found = stored_directory(root, md5)
    if missing := [name for name in _LEARNT_FROM if name not in found]:
        raise UserError(f"{splits} has no {' and no '.join(missing)}")
    manifests = [found[name] for name in _LEARNT_FROM]
    if digests is not None and not all(
        file_sha256(path).startswith(tuple(digests) or "-") for path in manifests
    ):
        raise UserError("the manifests of its commit are not those that its run records")
    return frozenset(digest for path in manifests for digest in read_manifest(path)["sha256"])


def _recorded(root: Path, commit: str | None) -> dict[str, str]:
    return recorded_outs((read_yaml(root, "dvc.lock", commit) or {}).get("stages", {}))


def rescore(
    candidate: Results,
    baseline: Results,
    stored: StoredModel,
    raw: Path,
    significance: float,
    *,
    seen: frozenset[str] | None,
    unknown: str = "",
) -> Rescored:
    """Compare a baseline with a candidate on the candidate's test images.

    Args:
        candidate: results with predictions.
        baseline: results on another test set, perhaps without predictions.
        stored: the baseline's model.
        significance: level at which images that left the test set count as harder.
        seen: SHA-256 of the images that the candidate was trained or validated on; None if unknown.
        unknown: why they are unknown.

    Raises:
        UserError: an image is missing or differs, the model cannot be read, or each image was seen
            in training by one of the models.
    """
    if candidate.predictions is None:
        raise UserError("the candidate has no predictions")
    new = candidate.predictions
    notes = []
    if baseline.predictions is not None:
        new, changed = with_metadata_of(new, baseline.predictions)
        notes += changed
    learnt_from = (stored.seen or frozenset()) | (seen or frozenset())
    fair = new[~new["sha256"].isin(learnt_from)]
    if fair.empty:
        raise UserError("one of the two models was trained or validated on every image")
    threshold = read_threshold(stored.path)
    if threshold is None:
        threshold = stored.threshold
        notes.append(
            f"the model file of {baseline.name} does not say its threshold: {threshold:g} is used"
        )
    probability = _probabilities(stored.path, fair, raw)
    old = fair.assign(
        probability=probability, predicted=(probability >= threshold).astype(int)
    ).astype({"predicted": "Int64", "probability": "Float64"})
    before = baseline.predictions
    if before is not None and before["sha256"].isin(new["sha256"]).any():
        old = old[before.columns]  # `pair` recognizes new metadata by these columns
    scored = "image" if len(fair) == 1 else "images"
    notes.insert(
        0,
        f"the test set changed, so the stored model of {baseline.name} was scored on {len(fair)} "
        f"{scored} of the new one",
    )
    if left_out := len(new) - len(fair):
        notes.append(
            f"{left_out} of {len(new)} test images are not compared, because one of the two models "
            "was trained or validated on them; the floors count them"
        )
    for name, known, why in (
        (baseline.name, stored.seen, stored.unknown),
        (candidate.name, seen, unknown),
    ):
        if known is None:
            notes.append(
                f"it could not be checked whether {name} was trained on images of the test set, "
                f"which would make it look better than it is: {why}"
            )
    return Rescored(
        candidate=replace(candidate, predictions=new),
        compared=_results(candidate, fair),
        baseline=_results(baseline, old),
        notes=notes,
        questions=_questions(new, baseline, significance),
    )


def relabel(candidate: Results, baseline: Results, significance: float) -> Rescored | None:
    """Compare two models by the candidate's labels, without the baseline's model.

    Args:
        baseline: results on the same images; they have its model's probabilities.

    Returns:
        The comparison, or None if the baseline has no predictions or other images.
    """
    if candidate.predictions is None or baseline.predictions is None:
        return None
    new, notes = with_metadata_of(candidate.predictions, baseline.predictions)
    now, before = keyed(new), keyed(baseline.predictions)
    if not now.index.sort_values().equals(before.index.sort_values()):
        return None
    candidate = replace(candidate, predictions=new)
    return Rescored(
        candidate=candidate,
        compared=candidate,
        baseline=_results(baseline, before.assign(label=now["label"])),
        notes=notes,
        questions=_questions(new, baseline, significance),
    )


def _results(results: Results, predictions: pd.DataFrame) -> Results:
    """Return results with the metrics of other predictions."""
    labels, predicted = (predictions[name].to_numpy(dtype=int) for name in ("label", "predicted"))
    probabilities = predictions["probability"].to_numpy(dtype=float)
    # The smallest probability that is labelled male is a threshold that gives these labels.
    male = probabilities[predicted == 1]
    threshold = float(male.min()) if len(male) else 1.1
    metrics = classification_metrics(labels, probabilities, threshold=threshold)
    return replace(results, metrics=metrics, predictions=predictions.reset_index(drop=True))


def _probabilities(model: Path, predictions: pd.DataFrame, raw: Path) -> np.ndarray:
    """Return P(male) of the images of predictions by a stored model, float64 (n,)."""
    predictor = load_litert(model, threads=os.cpu_count() or 1)
    files = [raw / path for path in predictions["path"]]
    if missing := sum(not file.is_file() for file in files):
        raise UserError(
            f"{raw.name}/ lacks {missing} of {len(files)} test images; `dvc pull` or `dvc repro` "
            "brings them"
        )
    digests = list(predictions["sha256"])
    tasks = (
        joblib.delayed(_pixels)(
            files[start : start + _CHUNK],
            digests[start : start + _CHUNK],
            start,
            predictor.size,
            predictor.crop,
        )
        for start in range(0, len(files), _CHUNK)
    )
    jobs = 1 if len(files) <= _ALONE else -1
    found = {start: predictor.predict(pixels) for start, pixels in run_tasks(tasks, jobs=jobs)}
    return np.concatenate([found[start] for start in sorted(found)])


def _pixels(
    paths: list[Path], digests: list[str], start: int, size: int, crop: FaceCrop | None
) -> tuple[int, np.ndarray]:
    """Return `start`, and the largest faces as a model takes them, uint8 (n, size, size, 3)."""
    pixels = []
    for path, digest in zip(paths, digests, strict=True):
        check_file(path, digest)
        try:
            pixels.append(face_images(path, size, crop)[0][1])
        except InvalidImage as error:
            raise UserError(f"{path.name} cannot be decoded: {error}") from error
    return start, np.stack(pixels)


def _questions(new: pd.DataFrame, baseline: Results, significance: float) -> list[str]:
    """Return the reasons why somebody must accept the new test set.

    Choosing images or labels by a model's errors makes that model look better.
    """
    if baseline.predictions is None:
        return []
    now, before = keyed(new), keyed(baseline.predictions)
    shared = now.index.intersection(before.index)
    found = []
    if relabelled := int((now.loc[shared, "label"] != before.loc[shared, "label"]).sum()):
        found.append(f"{relabelled} of {len(shared)} images in both test sets have another label")
    right = before["label"] == before["predicted"]
    kept = right.index.isin(shared)
    table = [
        [int((right[part] == truth).sum()) for truth in (True, False)] for part in (kept, ~kept)
    ]
    easier = fisher_exact(table, alternative="greater").pvalue < significance
    if shared.size and not kept.all() and easier:
        found.append(
            f"the {sum(table[1])} images that left the test set are harder than those that stayed: "
            f"{baseline.name} is right on {right[~kept].mean():.4f} of them, and on "
            f"{right[kept].mean():.4f} of the others"
        )
    return found
