"""Dividing a manifest into train, validation and test splits."""

import logging
from pathlib import PurePosixPath

import pandas as pd
from sklearn.model_selection import train_test_split

from facegender.data.manifest import SPLITS
from facegender.errors import UserError
from facegender.labels import LABELS

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


def split_at_random(
    manifest: pd.DataFrame,
    *,
    test_fraction: float,
    validation_fraction: float,
    seed: int,
    clusters: pd.Series | None = None,
) -> dict[str, pd.DataFrame]:
    """Divide a manifest at random, stratified by label.

    The unit is the distinct picture: files that show the same one go to the same part. The result
    depends on the images and the seed only, not on file names or their order on disk.

    Args:
        manifest: columns `path`, `label`, `sha256` and any others.
        test_fraction: share of the distinct pictures that becomes the test split.
        validation_fraction: share of the rest that becomes the validation split.
        seed: source of chance.
        clusters: by path, which files show the same picture (`checks.find_clusters`); without it
            those with the same bytes do.

    Returns:
        The manifests of `train`, `validation` and `test`, in the order of `manifest`.

    Raises:
        UserError: there are too few images of a class to have one in each part.
    """
    rest, test = _divide(manifest, test_fraction, seed, clusters)
    train, validation = _divide(rest, validation_fraction, seed, clusters)
    return _checked({"train": train, "validation": validation, "test": test})


def split_by_folder(
    manifest: pd.DataFrame,
    *,
    validation_fraction: float,
    seed: int,
    clusters: pd.Series | None = None,
) -> dict[str, pd.DataFrame]:
    """Divide a manifest by the dataset's own train and test folders.

    Folder names are case-blind (train, training; validation, valid, val; test, testing). Without
    a test folder, the validation folder is the test split. Without a validation folder, the
    validation split is carved from the training folder. What `find_leaks` names is left out.

    Args:
        manifest: columns `path`, `label`, `sha256` and any others.
        validation_fraction: share of the training pictures, if there is no validation folder.
        seed: source of chance.
        clusters: as for `split_at_random`.

    Returns:
        The manifests of `train`, `validation` and `test`, in the order of `manifest`.

    Raises:
        UserError: an image lies in none of the folders, a part is missing, or there are too few
            images of a class to have one in each part.
    """
    if "test" not in set(manifest["path"].map(_folder_part)):
        _log.warning("the dataset has no test folder: its validation folder is the test split")
    leaks = find_leaks(manifest, clusters)
    rest = manifest[~manifest["path"].isin(leaks)]
    part = _folder_parts(manifest)[rest.index]
    parts = {name: rest[part == name] for name in SPLITS}
    if parts["validation"].empty:
        parts["train"], parts["validation"] = _divide(
            parts["train"], validation_fraction, seed, clusters
        )
    return _checked(parts)


def find_leaks(manifest: pd.DataFrame, clusters: pd.Series | None = None) -> dict[str, str]:
    """Name the images that also occur in a later part of the dataset's own division.

    Train comes before validation, and that before test: what is judged on is kept.

    Args:
        manifest: columns `path` and `sha256`, and any others.
        clusters: as for `split_at_random`.

    Returns:
        By path, in order, the later image that shows the same picture.

    Raises:
        UserError: an image lies in none of the folders, or a part is missing.
    """
    order = _folder_parts(manifest).map(SPLITS.index)
    unit = _units(manifest, clusters)
    last = order.groupby(unit).transform("max")
    kept = manifest["path"][order == last].groupby(unit[order == last]).min()
    return {
        path: f"is in {SPLITS[place]}, and {kept[of]!r} shows the same"
        for path, place, of in sorted(
            zip(
                manifest["path"][order < last],
                order[order < last],
                unit[order < last],
                strict=True,
            )
        )
    }


def _folder_parts(manifest: pd.DataFrame) -> pd.Series:
    """Return the part that each image's folder names."""
    part = manifest["path"].map(_folder_part)
    advice = "Set split.predefined=false to divide all images at random."
    if part.isna().any():
        outside = sorted({str(PurePosixPath(p).parent) for p in manifest.loc[part.isna(), "path"]})
        raise UserError(
            "split.predefined asks for the dataset's own train/test folders, but these are in "
            f"neither: {', '.join(outside[:10])}. {advice}"
        )
    if "test" not in set(part):
        part = part.replace("validation", "test")
    if not {"train", "test"} <= set(part):
        raise UserError(
            "split.predefined asks for the dataset's own train and test folders, but only "
            f"{', '.join(sorted(set(part)))} was found. {advice}"
        )
    return part


def _folder_part(path: str) -> str | None:
    names = (_FOLDERS.get(part.casefold()) for part in PurePosixPath(path).parent.parts)
    return next((name for name in names if name), None)


def _units(manifest: pd.DataFrame, clusters: pd.Series | None) -> pd.Series:
    return manifest["sha256"] if clusters is None else manifest["path"].map(clusters)


def _divide(
    manifest: pd.DataFrame, fraction: float, seed: int, clusters: pd.Series | None
) -> tuple[pd.DataFrame, ...]:
    """Return the rest and the `fraction`, by distinct picture, stratified by label."""
    unit = _units(manifest, clusters)
    # Sorted by content, so that neither names nor the order on disk decide.
    distinct = unit.drop_duplicates().sort_values()
    try:
        halves = train_test_split(
            distinct,
            test_size=fraction,
            random_state=seed,
            stratify=manifest["label"][distinct.index].to_numpy(dtype=int),
        )
    except ValueError as error:
        raise UserError(
            f"Cannot divide {len(distinct)} distinct image(s) into parts with both classes: "
            f"{error} Add images, or change the fractions under split in params.yaml."
        ) from error
    return tuple(manifest[unit.isin(half)] for half in halves)


def _checked(parts: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    for name, part in parts.items():
        missing = [label for label, value in LABELS.items() if not (part["label"] == value).any()]
        if missing:
            raise UserError(
                f"The {name} part has no image labelled {' or '.join(missing)}. Add images, or "
                "change the fractions under split in params.yaml."
            )
    return {name: parts[name].reset_index(drop=True) for name in SPLITS}
