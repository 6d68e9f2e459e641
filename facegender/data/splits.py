"""Dividing a manifest into train, validation and test splits."""

import logging
from pathlib import PurePosixPath

import pandas as pd
from sklearn.model_selection import train_test_split

from facegender.data.manifest import SPLIT_FOLDERS, SPLITS
from facegender.errors import UserError
from facegender.labels import LABELS

_log = logging.getLogger(__name__)


def split_at_random(
    manifest: pd.DataFrame,
    *,
    test_fraction: float,
    validation_fraction: float,
    seed: int,
    duplicate_groups: pd.Series | None = None,
) -> dict[str, pd.DataFrame]:
    """Divide a manifest at random, stratified by label.

    The unit is the distinct picture: files that show the same one go to the same split. The result
    depends on the images and the seed only, not on file names or their order on disk.

    Args:
        manifest: columns `path`, `label`, `sha256` and any others.
        test_fraction: share of the distinct pictures that becomes the test split.
        validation_fraction: share of the rest that becomes the validation split.
        seed: source of chance.
        duplicate_groups: by path, the group of files that show the same picture
            (`checks.find_duplicate_groups`); without it, files with the same bytes form a group.

    Returns:
        The manifests of `train`, `validation` and `test`, in the order of `manifest`.

    Raises:
        UserError: there are too few images of a class to have one in each split.
    """
    rest, test = _divide(manifest, test_fraction, seed, duplicate_groups)
    train, validation = _divide(rest, validation_fraction, seed, duplicate_groups)
    return _checked({"train": train, "validation": validation, "test": test})


def split_by_folder(
    manifest: pd.DataFrame,
    *,
    validation_fraction: float,
    seed: int,
    duplicate_groups: pd.Series | None = None,
) -> dict[str, pd.DataFrame]:
    """Divide a manifest by the dataset's own train and test folders.

    Folder names are case-blind (train, training; validation, valid, val; test, testing). Without
    a test folder, the validation folder is the test split. Without a validation folder, the
    validation split is carved from the training folder. What `find_leaks` names is left out.

    Args:
        manifest: columns `path`, `label`, `sha256` and any others.
        validation_fraction: share of the training pictures, if there is no validation folder.
        seed: source of chance.
        duplicate_groups: as for `split_at_random`.

    Returns:
        The manifests of `train`, `validation` and `test`, in the order of `manifest`.

    Raises:
        UserError: an image lies in none of the folders, a split is missing, or there are too few
            images of a class to have one in each split.
    """
    if "test" not in set(manifest["path"].map(_folder_split)):
        _log.warning("the dataset has no test folder: its validation folder is the test split")
    leaks = find_leaks(manifest, duplicate_groups)
    rest = manifest[~manifest["path"].isin(leaks)]
    split = _folder_splits(manifest)[rest.index]
    splits = {name: rest[split == name] for name in SPLITS}
    if splits["validation"].empty:
        splits["train"], splits["validation"] = _divide(
            splits["train"], validation_fraction, seed, duplicate_groups
        )
    return _checked(splits)


def find_leaks(manifest: pd.DataFrame, duplicate_groups: pd.Series | None = None) -> dict[str, str]:
    """Name the images that also occur in a later split of the dataset's own division.

    Train comes before validation, and that before test: what is judged on is kept.

    Args:
        manifest: columns `path` and `sha256`, and any others.
        duplicate_groups: as for `split_at_random`.

    Returns:
        By path, in order, the later image that shows the same picture.

    Raises:
        UserError: an image lies in none of the folders, or a split is missing.
    """
    order = _folder_splits(manifest).map(SPLITS.index)
    unit = _units(manifest, duplicate_groups)
    last = order.groupby(unit).transform("max")
    kept = manifest["path"][order == last].groupby(unit[order == last]).min()
    return {
        path: f"is in {SPLITS[index]}, and {kept[kept_unit]!r} shows the same"
        for path, index, kept_unit in sorted(
            zip(
                manifest["path"][order < last],
                order[order < last],
                unit[order < last],
                strict=True,
            )
        )
    }


def _folder_splits(manifest: pd.DataFrame) -> pd.Series:
    """Return the split that each image's folder names."""
    split = manifest["path"].map(_folder_split)
    advice = "Set split.predefined=false to divide all images at random."
    if split.isna().any():
        outside = sorted({str(PurePosixPath(p).parent) for p in manifest.loc[split.isna(), "path"]})
        raise UserError(
            "split.predefined asks for the dataset's own train/test folders, but these are in "
            f"neither: {', '.join(outside[:10])}. {advice}"
        )
    if "test" not in set(split):
        split = split.replace("validation", "test")
    if not {"train", "test"} <= set(split):
        raise UserError(
            "split.predefined asks for the dataset's own train and test folders, but only "
            f"{', '.join(sorted(set(split)))} was found. {advice}"
        )
    return split


def _folder_split(path: str) -> str | None:
    names = (SPLIT_FOLDERS.get(part.casefold()) for part in PurePosixPath(path).parent.parts)
    return next((name for name in names if name), None)


def _units(manifest: pd.DataFrame, duplicate_groups: pd.Series | None) -> pd.Series:
    return (
        manifest["sha256"] if duplicate_groups is None else manifest["path"].map(duplicate_groups)
    )


def _divide(
    manifest: pd.DataFrame, fraction: float, seed: int, duplicate_groups: pd.Series | None
) -> tuple[pd.DataFrame, ...]:
    """Return the rest and the `fraction`, by distinct picture, stratified by label."""
    unit = _units(manifest, duplicate_groups)
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
            f"Cannot divide {len(distinct)} distinct image(s) into splits with both classes: "
            f"{error} Add images, or change the fractions under split in params.yaml."
        ) from error
    return tuple(manifest[unit.isin(half)] for half in halves)


def _checked(splits: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    for name, images in splits.items():
        missing = [label for label, value in LABELS.items() if not (images["label"] == value).any()]
        if missing:
            raise UserError(
                f"The {name} split has no image labelled {' or '.join(missing)}. Add images, or "
                "change the fractions under split in params.yaml."
            )
    return {name: splits[name].reset_index(drop=True) for name in SPLITS}
