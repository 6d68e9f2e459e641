"""Labels from class folders, from tables, or from file names."""

import csv
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path, PurePosixPath
from posixpath import commonpath

import pandas as pd

from facegender.data.image_files import find_tables
from facegender.data.image_finder import ImageFinder
from facegender.data.labelling_notes import Notes
from facegender.data.manifest import COLUMNS
from facegender.data.metadata import (
    MissingColumnError,
    as_written,
    one_row_each,
    our_name,
    read_csv,
    rows_by_image,
    tidy_cells,
)
from facegender.data.splits import split_of_folder
from facegender.errors import UserError
from facegender.labels import LABELS
from facegender.params import FilenameLabels, Labels, TableLabels

_ANSWERS = {"false", "true", "no", "yes"}  # may answer any question, as numbers may
_log = logging.getLogger(__name__)


def meanings(
    female: Sequence[str], male: Sequence[str], ignore: Sequence[str], where: str, what: str
) -> dict[str, int | None]:
    """Return the label of each name, by the name as `_spelt` returns it; None to leave it out.

    Raises:
        UserError: one name is listed twice with different meanings.
    """
    meaning: dict[str, int | None] = {}
    for names, label in ((female, 0), (male, 1), (ignore, None)):
        for name in names:
            if meaning.setdefault(_spelt(name), label) != label:
                raise UserError(
                    f"The {what} {name!r} is listed under two classes: see {where} in params.yaml."
                )
    return meaning


def _spelt(name: str) -> str:
    """Return a name without differences of case, Unicode form and spaces at its ends."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def label_images(
    paths: Sequence[PurePosixPath],
    *,
    female: Sequence[str],
    male: Sequence[str],
    ignore: Sequence[str],
) -> pd.DataFrame:
    """Give each image the label of the folders above it whose names, in any case, are aliases.

    An alias of one letter counts only at the top level of the dataset: below folders that all
    images share or that name a split. Elsewhere, such folders group names by first letter.

    Args:
        paths: images, relative to the raw data.
        ignore: folder names whose images are left out, unless a nearer folder names a class.

    Returns:
        A frame with the columns `path` (str) and `label` (int), in the order of `paths`.

    Raises:
        UserError: an image lies below no known folder, or below folders of both classes.
    """
    meaning = meanings(female, male, ignore, "split.classes", "folder name")
    shared = len(Path(commonpath([path.parent for path in paths])).parts) if paths else 0
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
        if rows:
            first = next(path for path in paths if len(path.parts) == 1)
            raise UserError(
                f"Cannot tell the class of {unknown['.']} image(s): they lie next to the class "
                f"folders instead of in one, such as {str(first)!r}. Move them into a class "
                "folder, or list them in the file that data.exclude names."
            )
        raise UserError(
            f"Cannot tell the class of {unknown['.']} image(s): they are not in a subfolder, and "
            "labels come from folder names. If labels are in a table or in the file names, use "
            "dataset=table, filename, celeba, fairface or utkface; else sort the images into class "
            "folders (female/, male/). docs/own-data.md shows each."
        )
    if unknown:
        listed = ", ".join(
            f"{folder!r} ({count})" for folder, count in sorted(unknown.items())[:20]
        )
        letters = (
            " A name of one letter counts only at the top level of the dataset: rename the folders."
            if any(_spelt(part) in meaning for folder in unknown for part in Path(folder).parts)
            else ""
        )
        raise UserError(
            f"Cannot tell the class of the images in {len(unknown)} folder(s): {listed}. Known "
            f"names, in any case, are {', '.join(female)} for female (0) and {', '.join(male)} for "
            "male (1). Map folders by naming all that mean a label, or leave them out: add to your "
            "command, for example, `-S \"split.classes.female=['female','ladies']\"` or "
            f"`-S \"split.classes.ignore=['unknown']\"`.{letters}"
        )
    return pd.DataFrame(rows, columns=["path", "label"]).astype({"path": str, "label": int})


def _class_folders(path: PurePosixPath, known: Container[str], shared: int) -> list[str]:
    """Return the known folder names above an image, outermost first.

    `shared` is the number of leading folders that all images share.
    """
    found = []
    top = True
    for index, part in enumerate(path.parent.parts):
        name = _spelt(part)
        if name in known and (top or len(name) > 1):
            found.append(name)
        inside = index < shared and name not in known
        top = top and (inside or split_of_folder(name) is not None)
    return found


def label_by_table(
    directory: Path,
    images: Sequence[PurePosixPath],
    labels: TableLabels,
    notes: Notes,
    unused: Mapping[Path, Sequence[str]],
) -> tuple[pd.DataFrame, list[Path]]:
    """Label images by the rows of one or more CSVs.

    `ImageFinder` finds the image of a row. CSVs without the columns may be metadata.

    Args:
        images: images, relative to `directory`.
        notes: where to note images without a row, and rows without an image; its excluded images
            are left out with their rows.
        unused: columns that are not metadata, by CSV.

    Returns:
        A frame with the columns `path`, `label` and the other columns of the CSVs, sorted by path,
        and the CSVs that gave labels.

    Raises:
        UserError: no CSV has such a name and both columns, one cannot be read, a value is unknown,
            a row fits several images, or two rows of one image differ in more than the spelling of
            the label.
    """
    sources = find_tables(directory, labels.file)
    if not sources:
        others = sorted({path.name for path in find_tables(directory)})
        raise UserError(
            f"dataset.labels.file is {labels.file!r}, and the data hold no such file. CSVs found: "
            f"{', '.join(others[:10]) or 'none'}. Name one of them (save other tables as "
            "CSV), or choose where else labels come from (docs/own-data.md)."
        )
    paths = [str(path) for path in images]
    finder = ImageFinder([*paths, *notes.excluded], notes.excluded)
    tables: dict[str, pd.DataFrame] = {}
    without: dict[str, MissingColumnError] = {}
    for source in sources:
        name = source.relative_to(directory).as_posix()
        try:
            table, files, given = read_csv(source, labels.image, unused.get(source, ()))
            column = as_written(labels.label, list(given))
            if column not in given:
                raise MissingColumnError(f"it has no `{labels.label}` column")
        except MissingColumnError as error:
            without[name] = error
            continue
        except (OSError, ValueError, csv.Error) as error:
            raise _no_labels(name, error) from error
        table.insert(0, "label", table.pop(given[column]))
        tables[name] = rows_by_image(table, files, PurePosixPath(name), finder, notes)
        if several := notes.ambiguous_rows.get(name):
            raise UserError(
                f"{name} names {several['first']!r}, which fits {several['fitting']} images: "
                f"{', '.join(map(repr, several['images']))}. Write the folders into the table, or "
                "leave out the other images with data.exclude."
            )
    if not tables:
        raise _no_labels(*next(iter(without.items())))
    if len(tables) > 1:
        _log.info("labels come from %d CSVs: %s", len(tables), ", ".join(list(tables)[:10]))
    found = pd.concat(tables, names=["table"])
    found = found[found.index.isin(set(paths), level="path")]
    found = found.assign(label=_one_spelling(found["label"], labels))
    rows = one_row_each(found)
    notes.unlabelled |= {path: "has no row" for path in paths if path not in rows.index}
    rows = rows.sort_index().reset_index()
    label = rows.pop("label").fillna("")
    label = _labels(label, labels, f"column {labels.label!r} of {labels.file}")
    rows.insert(1, "label", label)
    return _labelled(rows), [directory / name for name in tables]


def _no_labels(table: str, error: Exception) -> UserError:
    advice = (
        "Set dataset.labels.image and dataset.labels.label to its columns, which its first line "
        "must name."
        if isinstance(error, MissingColumnError)
        else "Correct the file."
    )
    return UserError(f"Cannot take labels from {table}: {error}. {advice}")


def label_by_name(
    images: Sequence[PurePosixPath], labels: FilenameLabels, notes: Notes
) -> pd.DataFrame:
    """Label images by the group `label` of a pattern that matches the whole file name.

    Args:
        images: images, relative to the raw data, sorted.
        notes: where to note images whose names do not match.

    Returns:
        A frame with the columns `path`, `label` and the other groups of the pattern.

    Raises:
        UserError: a value is unknown.
    """
    pattern = re.compile(labels.pattern)
    groups: dict[str, dict[str, str | None]] = {}
    for path in images:
        if match := pattern.fullmatch(path.name):
            groups[str(path)] = match.groupdict()
        else:
            notes.unlabelled[str(path)] = "does not match dataset.labels.pattern"
    table = tidy_cells(
        pd.DataFrame(list(groups.values()), columns=list(pattern.groupindex), dtype="string")
    )
    value = table.pop("label").fillna("")
    table = table.rename(columns=our_name)
    table.insert(0, "path", pd.Series(list(groups), dtype=str))
    table.insert(1, "label", _labels(value, labels, "file names"))
    return _labelled(table)


def compare_labels(
    manifest: pd.DataFrame,
    female: Sequence[str],
    male: Sequence[str],
    labels: Labels | None,
    notes: Notes,
) -> None:
    """Record what contradicts labels: metadata columns, and class folders that do not give them.

    A column is compared if its values are words for both labels. Numbers and answers are not words:
    in CelebA, -1 and 1 are the values of every column. Nor are single letters next to other values,
    as sizes. Folders of one letter are not compared, because they may be alphabetical.

    Args:
        female: names of class folders.
        labels: where labels come from; its own words take precedence in columns.
    """
    classes = LABELS | meanings(female, male, (), "split.classes", "folder name")
    own = labels if isinstance(labels, TableLabels | FilenameLabels) else None
    known = classes | (meanings(own.female, own.male, (), "dataset.labels", "value") if own else {})
    words = {
        name: label for name, label in known.items() if name.isalpha() and name not in _ANSWERS
    }
    for column in manifest.columns.drop(COLUMNS):
        values = manifest[column].dropna()
        means = {value: words.get(_spelt(value)) for value in values.unique()}
        if None in means.values():
            means = {value: label for value, label in means.items() if len(_spelt(value)) > 1}
        _note_contradiction(manifest, column, values, values.map(means), notes)
    if own:
        paths = manifest["path"].map(PurePosixPath)
        found = paths.map(lambda path: [n for n in _class_folders(path, classes, 0) if len(n) > 1])
        one = found.map(lambda names: len({classes[name] for name in names}) == 1)
        values = found[one].str[-1]
        _note_contradiction(manifest, "class folder", values, values.map(classes), notes)


def _note_contradiction(
    manifest: pd.DataFrame, name: str, values: pd.Series, labels: pd.Series, notes: Notes
) -> None:
    """Record the images whose label contradicts the column or folders called `name`, if any do.

    Args:
        values: what they say, by image.
        labels: the label that each value means, missing if it means none.
    """
    labels = labels.dropna()
    if set(labels) == {0, 1} and (
        others := list(labels.index[labels != manifest["label"][labels.index]])
    ):
        first = manifest["path"][others[0]]
        notes.other_labels[name] = {"images": len(others), "first": first}
        what = name if name == "class folder" else f"metadata column {name}"
        _log.warning(
            "the %s contradicts the label of %d image(s), which stays: the first is %r, whose %s "
            "is %s",
            *(what, len(others), first, name, values[others[0]]),
        )


def _labels(values: pd.Series, labels: TableLabels | FilenameLabels, where: str) -> pd.Series:
    """Return the labels of values, missing if ignored. Raises UserError if one is unknown."""
    meaning = meanings(labels.female, labels.male, labels.ignore, "dataset.labels", "value")
    keys = values.map(_spelt)
    unknown = Counter(values[~keys.isin(set(meaning))])
    if unknown:
        listed = ", ".join(f"{value!r} ({count})" for value, count in sorted(unknown.items())[:20])
        raise UserError(
            f"Unknown values in the {where}: {listed}. Known are "
            f"{', '.join(labels.female)} for female (0) and {', '.join(labels.male)} for male (1). "
            "Name all values that mean a label, or leave images out: add to your command, for "
            "example, `-S \"dataset.labels.female=['f','lady']\"` or "
            "`-S \"dataset.labels.ignore=['unknown']\"`."
        )
    return keys.map(meaning).astype("Int64")


def _one_spelling(values: pd.Series, labels: TableLabels) -> pd.Series:
    """Return values in one spelling for each meaning: that of its first value."""
    meaning = meanings(labels.female, labels.male, labels.ignore, "dataset.labels", "value")
    keys = values.map(_spelt, na_action="ignore")
    # Prefixed, because unknown values may be equal to a label: 0 and 1.
    same = keys.map({name: f"label {label}" for name, label in meaning.items()}).fillna(keys)
    return values.groupby(same).transform("first")


def _labelled(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows[rows["label"].notna()].reset_index(drop=True)
    return rows.astype({"label": int})
