"""Where labels come from: class folders, a table beside the images, or their file names."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Container, Sequence
from pathlib import Path, PurePosixPath

import pandas as pd

from facegender.data.manifest import SPLIT_FOLDERS
from facegender.data.metadata import one_row_each, our_name, read_csv
from facegender.data.notes import Notes
from facegender.errors import UserError
from facegender.params import FilenameLabels, TableLabels


def meanings(
    female: Sequence[str], male: Sequence[str], ignore: Sequence[str], where: str, what: str
) -> dict[str, int | None]:
    """Return what each name means, by the name in lower case: 0, 1 or None to leave out.

    Raises:
        UserError: one name is listed twice with different meanings.
    """
    meaning: dict[str, int | None] = {}
    for names, label in ((female, 0), (male, 1), (ignore, None)):
        for name in names:
            if meaning.setdefault(name.casefold(), label) != label:
                raise UserError(
                    f"The {what} {name!r} is listed under two classes: see {where} in params.yaml."
                )
    return meaning


def label_images(
    paths: Sequence[PurePosixPath],
    *,
    female: Sequence[str],
    male: Sequence[str],
    ignore: Sequence[str],
) -> pd.DataFrame:
    """Give each image the label of the folders above it whose names, in any case, are aliases.

    An alias of one letter counts only at the top level of the dataset: below folders that all
    images share or that name a split. Elsewhere such folders sort names by their first letter.

    Args:
        paths: images, relative to the raw data.
        female: folder names that mean female.
        male: folder names that mean male.
        ignore: folder names whose images are left out, unless a nearer folder names a class.

    Returns:
        A frame with the columns `path` (str) and `label` (int), in the order of `paths`.

    Raises:
        UserError: an image lies below no known folder, or below folders of both classes.
    """
    meaning = meanings(female, male, ignore, "split.classes", "folder name")
    shared = _shared_folders(paths)
    rows: list[tuple[str, int]] = []
    unknown: dict[str, int] = {}
    contradicting: list[str] = []
    for path in paths:
        found = [meaning[name] for name in _class_folders(path, meaning, shared)]
        if not found:
            folder = str(path.parent)
            unknown[folder] = unknown.get(folder, 0) + 1
        elif (label := found[-1]) is not None:
            if {0, 1} <= set(found):
                contradicting.append(str(path))
            rows.append((str(path), label))

    if contradicting:
        shown = ", ".join(repr(path) for path in contradicting[:10])
        raise UserError(
            f"{len(contradicting)} image(s) lie below folders of both classes: {shown}. Rename or "
            "move the folders, or remove a name from split.classes in params.yaml."
        )
    if "." in unknown and len(unknown) == 1:
        raise UserError(
            f"Cannot tell the class of {unknown['.']} image(s): they are in no subfolder, and "
            "labels come from folder names. If labels are in a table or in the file names, "
            "use dataset=table, filename, celeba, fairface or utkface; else sort the images into "
            "class folders (female/, male/). docs/kaggle.md shows each."
        )
    if unknown:
        listed = ", ".join(
            f"{folder!r} ({count})" for folder, count in sorted(unknown.items())[:20]
        )
        raise UserError(
            f"Cannot tell the class of the images in {len(unknown)} folder(s): {listed}. Known "
            f"names, in any case, are {', '.join(female)} for female (0) and {', '.join(male)} for "
            "male (1). Map a folder by adding its name, for example with "
            "`dvc exp run -S 'split.classes.female=[ladies]' -S 'split.classes.male=[gents]'`, or "
            "leave it out with `-S 'split.classes.ignore=[unknown]'`."
        )
    return pd.DataFrame(rows, columns=["path", "label"]).astype({"path": str, "label": int})


def _shared_folders(paths: Sequence[PurePosixPath]) -> int:
    """Return the number of leading folders that all paths share."""
    parents = [path.parent.parts for path in paths]
    if not parents:
        return 0
    first, last = min(parents), max(parents)
    return next(
        (
            index
            for index, names in enumerate(zip(first, last, strict=False))
            if len(set(names)) > 1
        ),
        min(len(first), len(last)),
    )


def _class_folders(path: PurePosixPath, known: Container[str], shared: int) -> list[str]:
    """Return the known folder names above an image, outermost first."""
    found = []
    top = True
    for index, part in enumerate(path.parent.parts):
        name = part.casefold()
        if name in known and (top or len(name) > 1):
            found.append(name)
        top = top and (name in SPLIT_FOLDERS or (index < shared and name not in known))
    return found


def label_by_table(
    directory: Path, images: Sequence[PurePosixPath], labels: TableLabels, notes: Notes
) -> tuple[pd.DataFrame, list[Path]]:
    """Label images by the rows of one or more CSVs.

    A row names its image by the path from its CSV or from `directory`, or by the last folders of
    the path and the file's name, if only one image ends so.

    Args:
        directory: raw data.
        images: images, relative to `directory`.
        labels: which CSVs, which columns, and what their values mean.
        notes: where to note images without row, and rows without image.

    Returns:
        A frame with the columns `path`, `label` and the other columns of the CSVs, sorted by path,
        and the CSVs.

    Raises:
        UserError: no CSV has such a name, one cannot be read or lacks a column, a value has no
            meaning, a row fits several images, or two rows of one image differ.
    """
    sources = sorted(directory.rglob(labels.file))
    if not sources:
        others = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*.csv"))
        raise UserError(
            f"dataset.labels.file is {labels.file!r}, and the data hold no such file. CSVs found: "
            f"{', '.join(others[:10]) or 'none'}."
        )
    paths = [str(path) for path in images]
    find = image_finder(paths)
    tables = []
    for source in sources:
        name = source.relative_to(directory).as_posix()
        try:
            table, files, given = read_csv(source, labels.image)
            if labels.label not in given:
                raise ValueError(f"it has no `{labels.label}` column")
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(
                f"Cannot take labels from {name}: {error}. dataset.labels.image and "
                "dataset.labels.label name its columns."
            ) from error
        parent = PurePosixPath(source.parent.relative_to(directory).as_posix())
        found = [find(parent, file, name) for file in files]
        matched = pd.Series([path is not None for path in found], dtype=bool).to_numpy()
        notes.unmatched(name, list(files[~matched]), len(files), next(iter(paths), None))
        values = table.pop(given[labels.label]).fillna("")
        table.insert(0, "value", values)
        table.index = pd.Index(found, name="path")
        tables.append(table[matched])
    rows = one_row_each(pd.concat(tables), f"{labels.file} labels")
    notes.unlabelled |= {path: "has no row" for path in paths if path not in rows.index}
    rows = rows.sort_index().reset_index()
    label = _labels(rows.pop("value"), labels, f"column {labels.label!r} of {labels.file}")
    rows.insert(1, "label", label)
    return _labelled(rows), sources


def label_by_name(
    images: Sequence[PurePosixPath], labels: FilenameLabels, notes: Notes
) -> pd.DataFrame:
    """Label images by the group `label` of a pattern that matches the whole file name.

    Args:
        images: images, relative to the raw data, sorted.
        labels: the pattern, and what the values of its group mean.
        notes: where to note images whose names do not match.

    Returns:
        A frame with the columns `path`, `label` and the other groups of the pattern.

    Raises:
        UserError: a value has no meaning.
    """
    pattern = re.compile(labels.pattern)
    columns = ["path", *pattern.groupindex]
    rows = []
    for path in images:
        match = pattern.fullmatch(path.name)
        if match:
            rows.append((str(path), *match.group(*pattern.groupindex, 0)[:-1]))
        else:
            notes.unlabelled[str(path)] = "does not match dataset.labels.pattern"
    table = pd.DataFrame(rows, columns=columns, dtype="string").replace("", pd.NA)
    table["path"] = table["path"].astype(str)
    value = table.pop("label").fillna("")
    table = table.rename(columns={name: our_name(name) for name in table.columns[1:]})
    table.insert(1, "label", _labels(value, labels, "file names"))
    return _labelled(table)


def _labels(values: pd.Series, labels: TableLabels | FilenameLabels, where: str) -> pd.Series:
    """Return the labels that values mean, missing where they are to be left out.

    Raises:
        UserError: a value has no meaning.
    """
    meaning = meanings(labels.female, labels.male, labels.ignore, "dataset.labels", "value")
    keys = values.str.strip().str.casefold()
    unknown = Counter(values[~keys.isin(set(meaning))])
    if unknown:
        listed = ", ".join(f"{value!r} ({count})" for value, count in sorted(unknown.items())[:20])
        raise UserError(
            f"The {where} hold values without meaning: {listed}. Known are "
            f"{', '.join(labels.female)} for female (0) and {', '.join(labels.male)} for male (1): "
            "add them to dataset.labels.female, male or ignore."
        )
    return keys.map(meaning).astype("Int64")


def _labelled(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows[rows["label"].notna()].reset_index(drop=True)
    return rows.astype({"label": int})


def image_finder(paths: Sequence[str]) -> Callable[[PurePosixPath, str, str], str | None]:
    """Return a function that finds the image that a row of a table names."""
    known: Container[str] = set(paths)
    # By how many of the last parts of a path, the images that end in them.
    endings: dict[int, dict[tuple[str, ...], list[str]]] = {}

    def find(parent: PurePosixPath, file: str, table: str) -> str | None:
        name = PurePosixPath(file.strip().replace("\\", "/"))
        for path in (str(parent / file), str(parent / name), str(name)):
            if path in known:
                return path
        count = len(name.parts)
        if count not in endings:
            endings[count] = {}
            for path in paths:
                endings[count].setdefault(PurePosixPath(path).parts[-count:], []).append(path)
        fitting = endings[count].get(name.parts, [])
        if len(fitting) > 1:
            raise UserError(
                f"{table} names {file!r}, which fits {len(fitting)} images: "
                f"{', '.join(map(repr, fitting[:5]))}. Write the folders into the table, or leave "
                "out the other images with data.exclude."
            )
        return fitting[0] if fitting else None

    return find
