from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from facegender.cli.main import _run
from facegender.data.preprocessing import write_split
from facegender.data.processed import ProcessedSplit
from facegender.data.raw_manifest import build_manifest
from facegender.data.splits import read_shared_groups, write_shared_groups
from facegender.errors import UserError
from facegender.evaluation import label_audit
from facegender.params import Params


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
    assert label_audit.judge_picture(image) == issue


@pytest.fixture
def splits(make_images: Callable[..., Path], tmp_path: Path) -> dict[str, ProcessedSplit]:
    raw = make_images(per_class=20)
    manifest = build_manifest(raw, female=["female"], male=["male"], ignore=[])
    # Brightness tells the classes of these images.
    wrong = manifest["path"] == "male/007.png"
    manifest["label"] = manifest["label"].where(~wrong, 0)
    # Metadata may have any names.
    manifest = manifest.assign(quality="good", suspect="no", split="x", issue="none")
    for name, start in (("train", 0), ("test", 1)):
        rows = manifest.iloc[start::2].reset_index(drop=True)
        write_split(rows, raw, tmp_path / name, size=32, name=name, jobs=1)
    return {name: ProcessedSplit(tmp_path / name) for name in ("train", "test")}


def features_by_brightness(splits: dict[str, ProcessedSplit]) -> np.ndarray:
    means = [batch.mean((1, 2, 3)) for part in splits.values() for batch in part.batches(9)]
    return np.repeat(np.concatenate(means)[:, None], 500, axis=1)


def test_issues_are_listed_with_the_worst_first_and_drawn(
    splits: dict[str, ProcessedSplit], tmp_path: Path
) -> None:
    found = label_audit.find_issues(splits, features_by_brightness(splits), {}, seed=0)
    assert list(found.issues.columns) == label_audit.COLUMNS
    first = found.issues.iloc[0]
    assert (first["path"], first["split"], first["issue"]) == ("male/007.png", "test", "label")
    assert first["label"] == 0
    assert (found.images, found.not_judged) == (40, None)
    assert found.accuracy == pytest.approx(39 / 40)
    assert found.summary() == "label 1, of 40 images"
    label_audit.draw_worst(splits, found, tmp_path / "worst.png")
    with Image.open(tmp_path / "worst.png") as drawn:
        # Something bright and noisy besides the text, which is black, red and green.
        assert len(drawn.convert("RGB").getcolors(1 << 24) or []) > 500


def test_groups_that_were_kept_together_are_judged_together(
    splits: dict[str, ProcessedSplit],
) -> None:
    paths = [path for part in splits.values() for path in part.index["path"]]
    person = np.array([int(path[-6:-4]) // 4 for path in paths])
    # All are known only by their person, and a person's pictures share a label.
    features = np.repeat(np.eye(20), 100, axis=1)[
        person + 10 * np.array(["female" not in path for path in paths])
    ]
    groups = dict(
        zip(
            paths,
            [f"{path[:4]}{who}" for path, who in zip(paths, person, strict=True)],
            strict=True,
        )
    )
    apart = label_audit.find_issues(splits, features, groups, seed=0)
    mixed = label_audit.find_issues(splits, features, {}, seed=0)
    assert apart.accuracy is not None
    assert mixed.accuracy is not None
    assert apart.accuracy < 0.6 < 0.9 < mixed.accuracy


def test_the_groups_travel_from_the_split(
    splits: dict[str, ProcessedSplit], tmp_path: Path
) -> None:
    manifests = {name: part.index for name, part in splits.items()}
    paths = [path for part in manifests.values() for path in part["path"]]
    groups = pd.Series([f"alone {path}" for path in paths], index=paths)
    groups[["male/001.png", "female/003.png"]] = "NA"
    groups["gone.png"] = f"alone {paths[0]}"  # its other picture was left out
    with pytest.raises(UserError, match="dvc repro split"):
        read_shared_groups(tmp_path)
    write_shared_groups(tmp_path, manifests, groups)
    assert read_shared_groups(tmp_path) == {"male/001.png": "NA", "female/003.png": "NA"}


def test_without_weights_pictures_are_judged_and_it_is_said_why_labels_are_not(
    splits: dict[str, ProcessedSplit], params: Params, tmp_path: Path
) -> None:
    assert params.model.weights == "none"
    found = label_audit.audit(splits, params, {})
    assert found.issues.columns.tolist() == label_audit.COLUMNS
    assert "label" not in set(found.issues["issue"])
    assert found.accuracy is None
    assert "model.weights is none" in (found.not_judged or "")
    assert "labels are not judged" in found.summary()
    label_audit.draw_worst(splits, found, tmp_path / "worst.png")
    assert (tmp_path / "worst.png").is_file()


def test_too_few_of_a_label_are_not_judged(splits: dict[str, ProcessedSplit]) -> None:
    paths = [path for part in splits.values() for path in part.index["path"]]
    groups = {path: path[-5] for path in paths if path.startswith("male") and path[-5] in "0123"}
    groups |= {path: "4" for path in paths if path.startswith("male") and path[-5] not in "0123"}
    few = {path: min(name, "3") for path, name in groups.items()}
    features = features_by_brightness(splits)
    found = label_audit.find_issues(splits, features, few, seed=0)
    assert found.not_judged == "a label has 4 different pictures or persons, fewer than 5"
    assert label_audit.find_issues(splits, features, groups, seed=0).not_judged is None


@pytest.mark.parametrize("output", ["issues.png", "."])
def test_the_picture_does_not_replace_the_list(output: str) -> None:
    with pytest.raises(UserError, match=r"name a \.csv file"):
        _run(["audit-labels", "--output", output])
