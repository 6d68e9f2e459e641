"""Dividing a manifest into train, validation and test splits."""

import hashlib
import logging
import re
from collections.abc import Mapping
from functools import cache
from itertools import dropwhile, takewhile
from math import floor
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from facegender.data.manifest import COLUMNS, SPLITS, read_manifest, write_table
from facegender.errors import UserError
from facegender.labels import LABELS

_SHARED_GROUPS = "groups.csv"
# A subject with more than this share of at least this many images is probably not a person but a
# value such as `unknown`.
_LARGE_SUBJECT, _FEW = 0.1, 100
# The split that a dataset's folder, in lower case, stands for; an ending may follow.
_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
}
_SPLIT_ENDINGS = ("", "set", "data", "images")
_log = logging.getLogger(__name__)


def split_at_random(
    manifest: pd.DataFrame,
    *,
    test_fraction: float,
    validation_fraction: float,
    seed: int,
    duplicate_groups: pd.Series | None = None,
    subjects: pd.Series | None = None,
) -> dict[str, pd.DataFrame]:
    """Divide a manifest at random, stratified by label.

    The unit is the distinct picture: files that show the same one share a split. The result depends
    on the images and the seed only, not on file names or their order on disk. The units of each
    label are ranked by a hash of seed and unit: the first make the test split, the last the
    validation split. One more image thus moves at most one other into or out of either.

    Args:
        manifest: columns `path`, `label`, `sha256` and any others.
        test_fraction: share of the distinct pictures for the test split.
        validation_fraction: share of the rest for the validation split.
        duplicate_groups: by path, the group of files that show one picture
            (`checks.find_duplicate_groups`); by default, files with the same bytes.
        subjects: by path, the group of files that must share a split (`group_by_subject`); by
            default, the duplicate group.

    Returns:
        The manifests of `train`, `validation` and `test`, in the order of `manifest`.

    Raises:
        UserError: a split would lack a class.
    """
    units = _Units(manifest, seed, duplicate_groups, subjects)
    rest, test = units.divide(manifest, test_fraction)
    train, validation = units.divide(rest, validation_fraction, from_end=True)
    return _checked({"train": train, "validation": validation, "test": test})


def split_by_folder(
    manifest: pd.DataFrame,
    *,
    validation_fraction: float,
    seed: int,
    duplicate_groups: pd.Series | None = None,
    subjects: pd.Series | None = None,
) -> dict[str, pd.DataFrame]:
    """Divide a manifest by the dataset's own train and test folders.

    `split_of_folder` recognises these folders. Without a test folder, the validation folder is the
    test split. Without a validation folder, the validation split is taken from the training folder.
    The images that `find_leaks` names are left out. Groups are those of `split_at_random`.

    Args:
        validation_fraction: share of the training pictures, if there is no validation folder.

    Returns:
        The manifests of `train`, `validation` and `test`, in the order of `manifest`.

    Raises:
        UserError: an image is outside these folders, the train or test split is missing, or a split
            would lack a class.
    """
    if "test" not in set(manifest["path"].map(_folder_split)):
        _log.warning("the dataset has no test folder: its validation folder is the test split")
    leaks = find_leaks(manifest, duplicate_groups, subjects)
    rest = manifest[~manifest["path"].isin(leaks)]
    split = _folder_splits(manifest)[rest.index]
    splits = {name: rest[split == name] for name in SPLITS}
    if splits["validation"].empty:
        units = _Units(splits["train"], seed, duplicate_groups, subjects)
        splits["train"], splits["validation"] = units.divide(
            splits["train"], validation_fraction, from_end=True
        )
    return _checked(splits)


def find_leaks(
    manifest: pd.DataFrame,
    duplicate_groups: pd.Series | None = None,
    subjects: pd.Series | None = None,
) -> dict[str, str]:
    """Find the images that recur in a later split of the dataset's own division.

    The order is train, validation, test, because the images that are judged on are to be kept.
    Groups are those of `split_at_random`.

    Args:
        manifest: columns `path` and `sha256`, and any others.

    Returns:
        Reasons by path, sorted, which name a later image of the same picture or subject.

    Raises:
        UserError: an image is outside these folders, or the train or test split is missing.
    """
    order = _folder_splits(manifest).map(SPLITS.index)
    leaks: dict[str, str] = {}
    kinds = [("is of the same subject", subjects)] if subjects is not None else []
    # A copy is the graver finding, so it comes last and replaces the words about the subject.
    for words, groups in [*kinds, ("shows the same", duplicate_groups)]:
        unit = _groups(manifest, groups)
        last = order.groupby(unit).transform("max")
        kept = manifest["path"][order == last].groupby(unit[order == last]).min()
        early = order < last
        leaks |= {
            path: f"is in {SPLITS[index]}, and {kept[kept_unit]!r} {words}"
            for path, index, kept_unit in zip(
                manifest["path"][early], order[early], unit[early], strict=True
            )
        }
    return dict(sorted(leaks.items()))


def group_by_subject(manifest: pd.DataFrame, duplicate_groups: pd.Series, column: str) -> pd.Series:
    """Group the files that are linked by the same picture or subject, directly or not.

    Args:
        manifest: columns `path`, `label`, `sha256` and the metadata.
        column: column of the metadata that names the subject; files with an empty cell are grouped
            with their duplicates only.

    Returns:
        By path, the name of the group: the first of its subjects, else the duplicate group.

    Raises:
        UserError: the metadata lack the column, or all of its cells are empty.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    metadata = list(manifest.columns.drop(COLUMNS))
    if column not in metadata or manifest[column].isna().all():
        others = ", ".join(metadata) or "none"
        raise UserError(
            f"split.group_by is {column}, and the metadata has no value for it. Columns of the "
            f"metadata: {others}. Put a CSV with the columns file and {column} next to the images, "
            "or set split.group_by=null."
        )
    subject = manifest[column]
    if missing := int(subject.isna().sum()):
        _log.warning(
            "split.group_by: %d of %d image(s) have no %s, so they stay together with their copies "
            "only; the first is %r",
            missing,
            len(manifest),
            column,
            manifest["path"][subject.isna()].iloc[0],
        )
    # Anna and anna are one: if separated by mistake, one person would be in train and test.
    folded = subject.astype("string").str.casefold()
    largest = folded.value_counts()
    if len(manifest) >= _FEW and largest.iloc[0] > _LARGE_SUBJECT * len(manifest):
        _log.warning(
            "split.group_by: %d of %d image(s) have the %s %r, and all of them go to one split; if "
            "that is not one subject, leave these cells empty",
            largest.iloc[0],
            len(manifest),
            column,
            subject[folded == largest.index[0]].iloc[0],
        )
    pictures = _groups(manifest, duplicate_groups)
    picture, _ = pd.factorize(pictures)
    person, _ = pd.factorize(folded)  # -1 where missing
    named = person >= 0
    size = picture.max() + 1
    ends = (picture[named], size + person[named])
    nodes = size + person.max() + 1
    _, joined = connected_components(coo_array((np.ones(named.sum()), ends), (nodes, nodes)), False)
    component = pd.Series(joined[picture], index=manifest.index)
    name = subject.groupby(component).transform("min")
    name = ("subject " + name.astype("string")).fillna(
        pictures.groupby(component).transform("min").astype("string")
    )
    return pd.Series(name.to_numpy(dtype=str), index=pd.Index(manifest["path"]), dtype=str)


def write_shared_groups(
    folder: Path, splits: Mapping[str, pd.DataFrame], groups: pd.Series
) -> None:
    """Write the images that share a picture or subject with another image, and their group."""
    left = groups[[path for images in splits.values() for path in images["path"]]]
    shared = left[left.duplicated(keep=False)]
    table = pd.DataFrame({"path": shared.index, "group": shared.to_numpy()})
    write_table(table, folder / _SHARED_GROUPS)


def read_shared_groups(folder: Path) -> dict[str, str]:
    """Return what `write_shared_groups` wrote. Raises UserError if the file is missing."""
    if not (folder / _SHARED_GROUPS).is_file():
        raise UserError(
            f"{folder.name}/{_SHARED_GROUPS} is missing, so labels cannot be judged without the "
            "images of the same person or picture: run `dvc repro split` to make it."
        )
    table = read_manifest(folder / _SHARED_GROUPS)
    return dict(zip(table["path"], table["group"], strict=True))


def _folder_splits(manifest: pd.DataFrame) -> pd.Series:
    """Return the split that each image's folder names."""
    split = manifest["path"].map(_folder_split)
    advice = "Set split.predefined=false to divide all images at random."
    if split.isna().any():
        outside = sorted({str(PurePosixPath(p).parent) for p in manifest.loc[split.isna(), "path"]})
        raise UserError(
            "split.predefined asks for the dataset's own train/test folders, but these are in "
            f"neither: {', '.join(outside[:10])}. Known names, in any case and followed by "
            f"{', '.join(_SPLIT_ENDINGS[1:])} or nothing, are {', '.join(_SPLIT_FOLDERS)}: rename "
            f"the folders. {advice}"
        )
    if "test" not in set(split):
        split = split.replace("validation", "test")
    if not {"train", "test"} <= set(split):
        raise UserError(
            "split.predefined asks for the dataset's own train and test folders, but only "
            f"{', '.join(sorted(set(split)))} was found. {advice}"
        )
    return split


@cache  # many images lie in few folders
def split_of_folder(name: str) -> str | None:
    """Return the split that a folder's name stands for: Train, test_set, "Training data"."""
    plain = re.sub(r"[\W_]+", "", name.casefold())
    known = (_SPLIT_FOLDERS.get(plain.removesuffix(ending)) for ending in _SPLIT_ENDINGS)
    return next(filter(None, known), None)


def _folder_split(path: str) -> str | None:
    names = map(split_of_folder, PurePosixPath(path).parent.parts)
    found = list(takewhile(bool, dropwhile(lambda name: name is None, names)))
    # Some archives hold train/train/ and train/test/: the inner folder counts.
    return found[-1] if found else None


def _groups(manifest: pd.DataFrame, groups: pd.Series | None) -> pd.Series:
    return manifest["sha256"] if groups is None else manifest["path"].map(groups)


class _Units:
    """Groups of images that share a split: the files of one picture, or of one subject."""

    def __init__(
        self,
        manifest: pd.DataFrame,
        seed: int,
        duplicate_groups: pd.Series | None,
        subjects: pd.Series | None,
    ) -> None:
        picture = _groups(manifest, duplicate_groups)
        unit = picture if subjects is None else manifest["path"].map(subjects)
        self._unit_of = dict(zip(manifest["path"], unit, strict=True))
        by_unit = pd.DataFrame({"picture": picture, "label": manifest["label"]}).groupby(
            unit.to_numpy()
        )
        table = by_unit.agg(pictures=("picture", "nunique"), label=("label", "mean"))
        table["rank"] = [hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in table.index]
        self._table = table.sort_values("rank")

    def divide(
        self, manifest: pd.DataFrame, fraction: float, *, from_end: bool = False
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the rest and a `fraction`, made of the first units of each label that fit.

        The number of pictures of one label does not depend on the other label.

        Args:
            manifest: images to divide; all files of a unit or none.
            fraction: share of the distinct pictures, rounded to the nearest number of them.
            from_end: whether to take the last units instead of the first.
        """
        unit = manifest["path"].map(self._unit_of)
        table = self._table[self._table.index.isin(set(unit))]
        chosen: list[str] = []
        # The mean label of a unit is 0, 1, or between them for a subject of both labels.
        for share in ((table["label"] == 0), (table["label"] == 1), (table["label"] % 1 > 0)):
            pictures = table.loc[share, "pictures"]
            left = floor(fraction * pictures.sum() + 0.5)
            for key, count in (pictures[::-1] if from_end else pictures).items():
                if count <= left:
                    chosen.append(str(key))
                    left -= count
        within = unit.isin(set(chosen))
        return manifest[~within], manifest[within]


def _checked(splits: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    for name, images in splits.items():
        missing = [label for label, value in LABELS.items() if not (images["label"] == value).any()]
        if missing:
            raise UserError(
                f"The {name} split has no image labelled {' or '.join(missing)}. Files of one "
                "picture, or of one subject of split.group_by, always share a split. Add images, "
                "or change the fractions under split in params.yaml."
            )
    return {name: splits[name].reset_index(drop=True) for name in SPLITS}
