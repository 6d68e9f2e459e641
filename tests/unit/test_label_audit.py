from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from facegender.data.preprocessing import write_split
from facegender.data.processed import ProcessedSplit
from facegender.data.raw_manifest import build_manifest
from facegender.errors import UserError
from facegender.params import Params
from facegender.training import label_audit


def features_of(labels: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 1, (len(labels), 20))
    noise[:, 0] += 6 * labels
    return noise


def test_flipped_labels_are_found_and_few_others() -> None:
    labels = np.tile([0, 1], 200)
    flipped = np.zeros(400, bool)
    flipped[::33] = True
    names = [str(number) for number in range(400)]
    given = np.where(flipped, 1 - labels, labels)
    found = label_audit.judge_labels(features_of(labels), given, names, seed=1)
    suspect = found["suspect"].to_numpy()
    assert suspect[flipped].all()
    assert suspect[~flipped].sum() <= 4
    assert set(np.argsort(found["quality"], kind="stable")[: flipped.sum()]) == set(
        np.flatnonzero(flipped)
    )
    again = label_audit.judge_labels(features_of(labels), given, names, seed=1)
    pd.testing.assert_frame_equal(found, again)


def test_a_group_is_never_judged_by_itself() -> None:
    # Ten pictures of each person, who are known only by their own feature: nothing carries over.
    person = np.repeat(np.arange(20), 10)
    labels = person % 2
    features = np.eye(20)[person]
    apart = label_audit.judge_labels(features, labels, [str(p) for p in person], seed=0)
    mixed = label_audit.judge_labels(features, labels, [str(n) for n in range(200)], seed=0)
    right = np.where(labels, mixed["probability"], 1 - mixed["probability"])
    assert right.min() > 0.5
    assert np.where(labels, apart["probability"], 1 - apart["probability"]).max() <= 0.55


def noise(low: int, high: int) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (64, 64, 3)).astype(np.uint8)


RAMP = np.repeat(np.linspace(20, 230, 64).astype(np.uint8)[None, :, None], 3, 2).repeat(64, 0)


@pytest.mark.parametrize(
    ("image", "issue"),
    [
        (noise(0, 256), ""),
        (noise(0, 60), "dark"),
        (noise(242, 256), "bright"),
        ((noise(0, 2) * 200).max(2, keepdims=True).repeat(3, 2), "low_information"),
        (RAMP, "blurred"),
    ],
)
def test_pictures_that_show_little_are_named(image: np.ndarray, issue: str) -> None:
    assert label_audit.judge_pictures([image[None]]) == [issue]


@pytest.fixture
def splits(make_images: Callable[..., Path], tmp_path: Path) -> dict[str, ProcessedSplit]:
    raw = make_images(per_class=20)
    manifest = build_manifest(raw, female=["female"], male=["male"], ignore=[])
    # Brightness tells the classes of these images.
    wrong = manifest["path"] == "male/007.png"
    manifest["label"] = manifest["label"].where(~wrong, 0)
    for name, start in (("train", 0), ("test", 1)):
        rows = manifest.iloc[start::2].reset_index(drop=True)
        write_split(rows, raw, tmp_path / name, size=32, name=name, jobs=1)
    return {name: ProcessedSplit(tmp_path / name) for name in ("train", "test")}


def test_issues_are_listed_with_the_worst_first_and_with_their_pictures(
    splits: dict[str, ProcessedSplit],
) -> None:
    means = np.concatenate(
        [batch.mean((1, 2, 3)) for part in splits.values() for batch in part.batches(9)]
    )
    features = np.repeat(means[:, None], 500, axis=1)
    found = label_audit.find_issues(splits, features, group_by=None, seed=0)
    assert list(found.columns) == label_audit.COLUMNS
    first = found.iloc[0]
    assert (first["path"], first["split"], first["issue"]) == ("male/007.png", "test", "label")
    assert first["label"] == 0
    shown = label_audit.pictures(splits, found.iloc[:1])
    assert shown.mean() > 150


def test_without_weights_it_says_what_it_needs(params: Params) -> None:
    assert params.model.weights == "none"
    with pytest.raises(UserError, match="recipe=best"):
        label_audit.extract_features({}, params)
