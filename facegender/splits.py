"""Dividing a manifest into train, validation and test parts."""

import logging
from pathlib import PurePosixPath

import pandas as pd
from sklearn.model_selection import train_test_split

from facegender.errors import UserError
from facegender.labels import LABELS

SPLITS = ("train", "validation", "test")

_FOLDERS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
}

_log = logging.getLogger(__name__)


def drop_label_conflicts(manifest: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Leave out every image that occurs, byte for byte, under both labels.

    Returns:
        The manifest without them, and their paths, sorted.
    """
    labels = manifest.groupby("sha256")["label"].transform("nunique")
    return manifest[labels == 1].reset_index(drop=True), sorted(manifest.loc[labels > 1, "path"])


def split_at_random(
    manifest: pd.DataFrame, *, test_fraction: float, validation_fraction: float, seed: int
) -> dict[str, pd.DataFrame]:
    """Divide a manifest at random, stratified by label.

    The unit is the distinct image: files with the same bytes go to the same part. The result
    depends on the images and the seed only, not on file names or their order on disk.

    Args:
        manifest: columns `path`, `label`, `sha256` and any others.
        test_fraction: share of the distinct images that becomes the test part.
        validation_fraction: share of the rest that becomes the validation part.
        seed: source of chance.

    Returns:
        The manifests of `train`, `validation` and `test`, in the order of `manifest`.

    Raises:
        UserError: there are too few images of a class to have one in each part.
    """
    rest, test = _divide(manifest, test_fraction, seed)
    train, validation = _divide(rest, validation_fraction, seed)
    return _checked({"train": train, "validation": validation, "test": test})


def split_by_folder(
    manifest: pd.DataFrame, *, validation_fraction: float, seed: int
) -> dict[str, pd.DataFrame]:
    """Divide a manifest by the dataset's own train and test folders.

    Folder names are case-blind (train, training; validation, valid, val; test, testing). Without
    a test folder, the validation folder is the test part. Without a validation folder, the
    validation part is carved from the training folder. An image that also occurs in a later part
    is removed from the earlier one, for it would leak.

    Returns:
        The manifests of `train`, `validation` and `test`, in the order of `manifest`.

    Raises:
        UserError: an image lies in none of the folders, a part is missing, or there are too few
            images of a class to have one in each part.
    """
    part = manifest["path"].map(_folder_part)
    advice = "Set split.predefined=false to divide all images at random."
    if part.isna().any():
        outside = sorted({str(PurePosixPath(p).parent) for p in manifest.loc[part.isna(), "path"]})
        raise UserError(
            "split.predefined asks for the dataset's own train/test folders, but these are in "
            f"neither: {', '.join(outside[:10])}. {advice}"
        )
    if "test" not in set(part):
        _log.warning("the dataset has no test folder: its validation folder is the test part")
        part = part.replace("validation", "test")
    if not {"train", "test"} <= set(part):
        raise UserError(
            "split.predefined asks for the dataset's own train and test folders, but only "
            f"{', '.join(sorted(set(part)))} was found. {advice}"
        )

    parts = {name: manifest[part == name] for name in SPLITS}
    for earlier, later in (("train", "validation"), ("train", "test"), ("validation", "test")):
        leaks = parts[earlier]["sha256"].isin(parts[later]["sha256"])
        if leaks.any():
            _log.warning("removed %d image(s) of %s that are in %s", leaks.sum(), earlier, later)
        parts[earlier] = parts[earlier][~leaks]
    if parts["validation"].empty:
        parts["train"], parts["validation"] = _divide(parts["train"], validation_fraction, seed)
    return _checked(parts)


def _folder_part(path: str) -> str | None:
    names = (_FOLDERS.get(part.casefold()) for part in PurePosixPath(path).parent.parts)
    return next((name for name in names if name), None)


def _divide(manifest: pd.DataFrame, fraction: float, seed: int) -> tuple[pd.DataFrame, ...]:
    """Return the rest and the `fraction`, by distinct image, stratified by label."""
    # Sorted by content, so that neither names nor the order on disk decide.
    distinct = manifest.drop_duplicates("sha256").sort_values("sha256")
    try:
        halves = train_test_split(
            distinct["sha256"],
            test_size=fraction,
            random_state=seed,
            stratify=distinct["label"].to_numpy(dtype=int),
        )
    except ValueError as error:
        raise UserError(
            f"Cannot divide {len(distinct)} distinct image(s) into parts with both classes: "
            f"{error} Add images, or change the fractions under split in params.yaml."
        ) from error
    return tuple(manifest[manifest["sha256"].isin(half)] for half in halves)


def _checked(parts: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    for name, part in parts.items():
        missing = [label for label, value in LABELS.items() if not (part["label"] == value).any()]
        if missing:
            raise UserError(
                f"The {name} part has no image labelled {' or '.join(missing)}. Add images, or "
                "change the fractions under split in params.yaml."
            )
    return {name: parts[name].reset_index(drop=True) for name in SPLITS}
