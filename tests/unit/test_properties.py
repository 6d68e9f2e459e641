"""Properties of manifests, splits and clusters that hold for any data, tried on what hypothesis
makes up; `make fuzz` tries more of it."""

import itertools
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory, TemporaryFile

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from facegender.data import alignment, similar_pictures
from facegender.data.checks import Findings, find_duplicate_groups
from facegender.data.fingerprint_store import Fingerprints, Thumbnails
from facegender.data.label_sources import label_images
from facegender.data.manifest import SPLITS, read_manifest, write_table
from facegender.data.near_duplicates import find_near_duplicates
from facegender.data.splits import find_leaks, split_at_random, split_by_folder
from facegender.errors import UserError

# What a file may be called: anything but a slash and NUL, and not only dots.
NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12
).filter(lambda name: name.strip(".") != "")
ALIASES = {"female": ["female", "women"], "male": ["male", "men"], "ignore": ["unknown"]}
KNOWN = [name for names in ALIASES.values() for name in names]


@st.composite
def manifests(draw: Callable, folders: tuple[str, ...] = ("",)) -> tuple[pd.DataFrame, pd.Series]:
    """A manifest in a random order, and its clusters, each of one label."""
    rows = []
    for folder, (name, label) in itertools.product(folders, (("female", 0), ("male", 1))):
        for number in range(draw(st.integers(8, 40))):
            # Few numbers: many files show the same picture.
            shown = draw(st.integers(0, 60))
            rows.append((f"{folder}{name}/{number}.jpg", label, f"{label}-{shown:03}"))
    frame = pd.DataFrame(rows, columns=["path", "label", "cluster"])
    frame["sha256"] = frame["cluster"] + [f"-{number % 2}" for number in range(len(frame))]
    order = draw(st.randoms(use_true_random=False)).sample(range(len(frame)), len(frame))
    frame = frame.iloc[order].reset_index(drop=True)
    clusters = frame.groupby("cluster")["sha256"].transform("min")
    clusters.index = pd.Index(frame["path"])
    return frame.drop(columns="cluster"), clusters


def divide(frame: pd.DataFrame, clusters: pd.Series, **options: float) -> dict[str, pd.DataFrame]:
    """Divide, unless the data are too few for it, which is an error of its own."""
    try:
        return split_at_random(frame, duplicate_groups=clusters, **options)  # type: ignore[arg-type]
    except UserError as error:
        assume("Cannot divide" not in str(error) and "has no image" not in str(error))
        raise


FRACTIONS = {
    "test_fraction": st.floats(0.1, 0.6),
    "validation_fraction": st.floats(0.1, 0.6),
    "seed": st.integers(0, 2**32 - 1),
}


@given(manifests(), st.fixed_dictionaries(FRACTIONS))
def test_a_split_loses_nothing_leaks_nothing_and_has_the_sizes_asked_for(
    data: tuple[pd.DataFrame, pd.Series], options: dict
) -> None:
    frame, clusters = data
    parts = divide(frame, clusters, **options)
    together = pd.concat(parts.values()).sort_values("path", ignore_index=True)
    pd.testing.assert_frame_equal(together, frame.sort_values("path", ignore_index=True))
    units = {name: set(part["path"].map(clusters)) for name, part in parts.items()}
    for one, other in itertools.combinations(units.values(), 2):
        assert not one & other
    # Stratified: of each label, the nearest number of pictures.
    for label in ("0-", "1-"):
        of = {unit for unit in clusters if unit.startswith(label)}
        test, validation = (len(units[name] & of) for name in ("test", "validation"))
        assert abs(test - options["test_fraction"] * len(of)) <= 0.5 + 1e-9
        assert abs(validation - options["validation_fraction"] * (len(of) - test)) <= 0.5 + 1e-9


@given(manifests(), st.fixed_dictionaries(FRACTIONS), st.randoms(use_true_random=False))
def test_a_split_depends_on_the_pictures_and_the_seed_only(
    data: tuple[pd.DataFrame, pd.Series], options: dict, dice: object
) -> None:
    frame, clusters = data
    parts = divide(frame, clusters, **options)
    order = dice.sample(range(len(frame)), len(frame))  # type: ignore[attr-defined]
    other = frame.iloc[order].reset_index(drop=True)
    renamed = other.assign(path=[f"{number}.jpg" for number in range(len(other))])
    new_clusters = pd.Series(clusters[other["path"]].to_numpy(), index=pd.Index(renamed["path"]))
    again = divide(renamed, new_clusters, **options)
    for name in SPLITS:
        assert sorted(parts[name]["sha256"]) == sorted(again[name]["sha256"])


@given(manifests(folders=("Train/", "Test/")), st.integers(0, 99))
def test_a_datasets_own_division_leaks_nothing(
    data: tuple[pd.DataFrame, pd.Series], seed: int
) -> None:
    frame, clusters = data
    try:
        parts = split_by_folder(
            frame, validation_fraction=0.2, seed=seed, duplicate_groups=clusters
        )
    except UserError:
        assume(False)
    assert set(parts["test"]["path"]) == {p for p in frame["path"] if p.startswith("Test")}
    units = [set(part["path"].map(clusters)) for part in parts.values()]
    for one, other in itertools.combinations(units, 2):
        assert not one & other
    kept = sum(len(part) for part in parts.values())
    leaks = find_leaks(frame, clusters)
    assert kept + len(leaks) == len(frame)
    test = units[SPLITS.index("test")]
    assert set(leaks) == {p for p in frame["path"] if p[:5] == "Train" and clusters[p] in test}


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(KNOWN) | NAMES, min_size=0, max_size=4), NAMES),
        max_size=20,
    ),
    st.randoms(use_true_random=False),
)
def test_a_label_is_that_of_the_folders_with_a_known_name(
    places: list[tuple[list[str], str]], dice: object
) -> None:
    case = [str.upper, str.lower, str.title, str]
    folders = [[dice.choice(case)(folder) for folder in names] for names, _ in places]  # type: ignore[attr-defined]
    paths = [PurePosixPath(*names, name) for names, (_, name) in zip(folders, places, strict=True)]
    paths += [PurePosixPath("female/a.jpg"), PurePosixPath("male/a.jpg")]
    meaning = {name: label for label, names in ALIASES.items() for name in names}
    spelt = [
        [unicodedata.normalize("NFC", part).strip().casefold() for part in path.parent.parts]
        for path in paths
    ]
    known = [[meaning[part] for part in parts if part in meaning] for parts in spelt]
    both = any(
        labels and labels[-1] != "ignore" and len({*labels} - {"ignore"}) > 1 for labels in known
    )
    if both or not all(known):
        with pytest.raises(UserError, match="both classes" if both else "Cannot tell the class"):
            label_images(paths, **ALIASES)
        return
    expected = [
        (str(path), {"female": 0, "male": 1}[labels[-1]])
        for path, labels in zip(paths, known, strict=True)
        if labels[-1] != "ignore"
    ]
    frame = label_images(paths, **ALIASES)
    assert list(zip(frame["path"], frame["label"], strict=True)) == expected


@given(st.lists(NAMES, min_size=1, max_size=20, unique=True))
def test_a_manifest_survives_its_file_whatever_files_are_called(names: list[str]) -> None:
    frame = pd.DataFrame(
        {"path": [f"female/{name}" for name in names], "label": 0, "sha256": "00e1"}
    )
    with TemporaryDirectory() as folder:
        write_table(frame, Path(folder) / "a.csv")
        again = read_manifest(Path(folder) / "a.csv")
    assert again["path"].tolist() == frame["path"].tolist()
    assert again["sha256"].tolist() == frame["sha256"].tolist()


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=40),
    st.randoms(use_true_random=False),
)
def test_clusters_are_what_chains_of_near_pictures_link(
    drawn: list[tuple[int, int]], dice: object
) -> None:
    """Pictures are numbers; those whose numbers differ by one or less are near."""
    places = np.array([10 * place + step for place, step in drawn])
    near = np.abs(places[:, None] - places[None]) <= 1
    count, expected = connected_components(coo_array(near))
    order = dice.sample(range(len(places)), len(places))  # type: ignore[attr-defined]

    def all_pairs(
        thumbnails: np.ndarray, groups: np.ndarray, _: Callable[..., object]
    ) -> Iterator[similar_pictures.Candidates]:
        pairs = np.array(list(itertools.permutations(range(len(thumbnails)), 2)))
        for some in np.array_split(pairs, 3):
            none = some[:0, 0]
            yield similar_pictures.Candidates(*some.T, some, some, none, none, len(groups))

    def same(one: np.ndarray, other: np.ndarray, *_: np.ndarray) -> np.ndarray:
        return np.abs(one - other) <= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "same_picture", same)
        patch.setattr(similar_pictures, "find_candidates", all_pairs)
        # Places stand for pictures.
        found = find_near_duplicates(places[order])
    members = [sorted(order[place] for place in cluster) for cluster in found.groups]
    wanted = [np.flatnonzero(expected == number).tolist() for number in range(count)]
    assert sorted(members) == sorted(group for group in wanted if len(group) > 1)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_files_with_the_same_bytes_are_one_cluster_in_any_order(
    contents: list[int], dice: object
) -> None:
    generator = np.random.default_rng(1)
    pictures = generator.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    rows = [(f"{number}.jpg", f"sha-{content}") for number, content in enumerate(contents)]
    dice.shuffle(rows)  # type: ignore[attr-defined]
    frame = pd.DataFrame(rows, columns=["path", "sha256"])
    shown = np.array([int(sha[-1]) for sha in frame["sha256"]])
    with TemporaryFile() as file:
        file.write(pictures.tobytes())
        file.flush()
        prints = Fingerprints(np.zeros((len(shown), 3)), Thumbnails(file, shown), {})
        clusters = find_duplicate_groups(frame, prints, Findings({}))
    assert clusters.to_dict() == dict(rows)
