"""Labels from folder names, and metadata from CSV files beside the images."""

import csv
import logging
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import pandas as pd

from facegender.data.image_files import IMAGE_SUFFIXES, find_images
from facegender.data.manifest import COLUMNS, SPLIT_FOLDERS
from facegender.errors import UserError
from facegender.files import file_sha256
from facegender.labels import LABELS

# Columns that this project gives its own meaning, in manifests and predictions.
_OURS = {*COLUMNS, "row", "probability", "predicted"}
_log = logging.getLogger(__name__)


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
        UserError: an image lies below no known folder, or below folders of both classes; or a class
            has no images.
    """
    meaning: dict[str, int | None] = {}
    for names, label in ((female, 0), (male, 1), (ignore, None)):
        for name in names:
            if meaning.setdefault(name.casefold(), label) != label:
                raise UserError(
                    f"The folder name {name!r} is listed under two classes: see split.classes in "
                    "params.yaml."
                )

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
            "labels come from folder names. Sort the images into class folders (female/, "
            "male/); docs/kaggle.md shows the layouts that work."
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
    frame = pd.DataFrame(rows, columns=["path", "label"]).astype({"path": str, "label": int})
    for name, label in LABELS.items():
        if not (frame["label"] == label).any():
            raise UserError(
                f"No image is labelled {name}: of {len(paths)} image file(s) found, "
                f"{len(frame)} lie in folders of the other class. Check the data, or the folder "
                "names under split.classes in params.yaml."
            )
    return frame


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


def read_metadata(directory: Path, images: Sequence[PurePosixPath]) -> pd.DataFrame:
    """Collect the columns of every CSV under `directory` that has a `file` column.

    Each `file` is a path relative to its CSV; backslashes separate folders, too. Every value is
    text, and only an empty cell is missing. A CSV that cannot be parsed is named and skipped; rows
    that match no image are counted. A column named like one of ours gets the prefix `metadata_`.

    Args:
        directory: the raw data.
        images: all images, relative to `directory`.

    Returns:
        A frame indexed by the image's path relative to `directory`; empty if there is no CSV.

    Raises:
        UserError: two rows say different things of one image, or a CSV cannot be opened.
    """
    known = {str(path) for path in images}
    tables = []
    for source in sorted(directory.rglob("*.csv")):
        name = source.relative_to(directory).as_posix()
        try:
            table = _read_csv(source)
        except OSError as error:
            raise UserError(f"Cannot read the metadata file {name}: {error.strerror}.") from error
        except (ValueError, csv.Error) as error:
            _log.warning("%s is skipped: %s", name, error)
            continue
        parent = PurePosixPath(source.parent.relative_to(directory).as_posix())
        table.index = pd.Index(
            [_image_path(parent, file, known) for file in table.pop("file")], dtype=str, name="path"
        )
        matched = table.index.isin(known)
        if not matched.all():
            _log.warning(
                "%s: %d of %d rows match no image; the first is %r, and an image is %r",
                name,
                (~matched).sum(),
                len(table),
                table.index[~matched][0],
                next(iter(sorted(known)), None),
            )
        tables.append(table[matched])
    if not tables:
        return pd.DataFrame(index=pd.Index([], name="path"))
    metadata = pd.concat(tables)
    metadata = metadata[~metadata.reset_index().duplicated().to_numpy()]
    if metadata.index.has_duplicates:
        twice = metadata.index[metadata.index.duplicated()].unique()[:5]
        raise UserError(
            f"The metadata describes the same file more than once: {', '.join(twice)}. Keep one "
            "row for each file."
        )
    return metadata


def _read_csv(source: Path) -> pd.DataFrame:
    """Return the rows that name a file, all as text, with the columns' names made unique.

    Raises:
        ValueError: the CSV has no column `file`, a longer row than its header, or is not UTF-8.
        csv.Error: the CSV cannot be parsed.
    """
    with source.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = next(csv.reader(file), [])
    if "file" not in header:
        raise ValueError("it has no `file` column")
    names: list[str] = []
    for number, name in enumerate(header, 1):
        free = name.strip() or f"column_{number}"
        if free in _OURS:
            free = f"metadata_{free}"
        names.append(f"{free}.{number}" if free in names else free)
    rows = []
    with source.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        next(reader)
        for row in reader:
            if any(row[len(names) :]):
                raise ValueError(f"line {reader.line_num} has more cells than the header")
            rows.append(dict(zip(names, row, strict=False)))
    table = pd.DataFrame(rows, columns=names, dtype="string").replace("", pd.NA)
    unnamed = [name for name, given in zip(names, header, strict=True) if not given.strip()]
    empty = [name for name in unnamed if table[name].isna().all()]
    return table[table["file"].notna()].drop(columns=empty)


def _image_path(parent: PurePosixPath, file: str, known: Container[str]) -> str:
    path = str(parent / file)
    return path if path in known else str(parent / file.replace("\\", "/"))


def build_manifest(
    directory: Path, *, female: Sequence[str], male: Sequence[str], ignore: Sequence[str]
) -> pd.DataFrame:
    """Return the manifest of the raw data in `directory`, sorted by path.

    The digest of a file that cannot be read is empty; the data checks name it with the reason.

    Raises:
        UserError: there is no image, or as `label_images` and `read_metadata` do.
    """
    paths = find_images(directory)
    if not paths:
        raise UserError(
            f"{directory.name}/ holds no images. Put them in one folder for each class "
            f"(female/, male/). Known endings are {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    manifest = label_images(paths, female=female, male=male, ignore=ignore)
    with ThreadPoolExecutor() as pool:
        manifest["sha256"] = list(pool.map(_digest, [directory / p for p in manifest["path"]]))
    metadata = read_metadata(directory, paths)
    return manifest.join(metadata, on="path")


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError:
        return ""
