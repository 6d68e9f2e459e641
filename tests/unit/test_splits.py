import itertools

import numpy as np
import pandas as pd
import pytest

from facegender.data.manifest import SPLITS
from facegender.data.splits import find_leaks, group_by_subject, split_at_random, split_by_folder
from facegender.errors import UserError


def manifest(female: int, male: int, folder: str = "") -> pd.DataFrame:
    rows = [
        (f"{folder}{name}/{number:04}.jpg", label, f"{name}{number:04}")
        for name, label, count in (("female", 0, female), ("male", 1, male))
        for number in range(count)
    ]
    return pd.DataFrame(rows, columns=["path", "label", "sha256"])


def divide(frame: pd.DataFrame, seed: int = 1) -> dict[str, pd.DataFrame]:
    return split_at_random(frame, test_fraction=0.3, validation_fraction=0.15, seed=seed)


def test_sizes_and_balance_of_the_study() -> None:
    parts = divide(manifest(1573, 2112))
    sizes = [len(parts[name]) for name in SPLITS]
    assert sizes == [2192, 387, 1106]
    for part in parts.values():
        assert part["label"].mean() == pytest.approx(2112 / 3685, abs=0.002)


def test_the_seed_decides() -> None:
    frame = manifest(50, 70)
    assert not divide(frame, 1)["test"].equals(divide(frame, 2)["test"])


@pytest.mark.parametrize("label", [0, 1])
def test_one_more_image_moves_at_most_one_other(label: int) -> None:
    frame = manifest(400, 301)
    before = divide(frame)
    sizes = set()
    for number in range(40):
        new = pd.DataFrame({"path": ["new.jpg"], "label": label, "sha256": f"new{number}"})
        after = divide(pd.concat([new, frame], ignore_index=True))
        sizes.add(len(after["test"]))
        for name in ("validation", "test"):
            old, now = set(before[name]["path"]), set(after[name]["path"])
            assert len(old - now) <= 1
            assert len(now - old - {"new.jpg"}) <= 1
            assert len(old ^ (now - {"new.jpg"})) <= 1
    # 0.3 of 401 rounds to what 0.3 of 400 does; 0.3 of 302 to one more than of 301.
    assert sizes == {120 + 90 + label}


def test_identical_images_stay_together() -> None:
    frame = manifest(60, 60)
    frame["sha256"] = [
        f"{row.label}-{number // 3}" for number, row in enumerate(frame.itertuples())
    ]
    parts = divide(frame)
    digests = [set(part["sha256"]) for part in parts.values()]
    for one, other in itertools.combinations(digests, 2):
        assert not one & other
    assert sum(map(len, parts.values())) == 120


def test_too_few_images_is_a_clear_error() -> None:
    with pytest.raises(UserError, match=r"split has no image labelled female.*Add images"):
        divide(manifest(1, 5))


def predefined(*parts: pd.DataFrame) -> dict[str, pd.DataFrame]:
    frame = pd.concat(parts, ignore_index=True)
    # Other parts hold other images.
    frame["sha256"] = [f"image-{number}" for number in range(len(frame))]
    return split_by_folder(frame, validation_fraction=0.2, seed=1)


def test_predefined_folders_are_kept_and_validation_comes_from_train() -> None:
    parts = predefined(manifest(20, 20, "Training/"), manifest(5, 6, "data/Test/"))
    assert len(parts["test"]) == 11
    assert set(parts["test"]["path"].str[:9]) == {"data/Test"}
    assert len(parts["validation"]) == 8
    assert parts["validation"]["path"].str.startswith("Training/").all()


def test_three_predefined_folders_are_all_kept() -> None:
    parts = predefined(manifest(9, 9, "train/"), manifest(4, 4, "valid/"), manifest(5, 5, "test/"))
    assert [len(parts[name]) for name in SPLITS] == [18, 8, 10]


def test_without_a_test_folder_validation_is_the_test_part() -> None:
    parts = predefined(manifest(20, 20, "Training/"), manifest(5, 5, "Validation/"))
    assert parts["test"]["path"].str.startswith("Validation/").all()


def test_a_split_folder_in_a_split_folder_tells_more() -> None:
    # Archives of one folder, and folders that an archive has twice.
    parts = predefined(manifest(20, 20, "train/train/"), manifest(5, 5, "train/Test/"))
    assert [len(parts[name]) for name in SPLITS] == [32, 8, 10]
    frames = [manifest(n, n, name) for n, name in ((20, "Train/Train/"), (4, "Train/val/"))]
    parts = predefined(*frames, manifest(5, 5, "Test/Test/"))
    assert [len(parts[name]) for name in SPLITS] == [40, 8, 10]
    # Below a class, Val is a person.
    frame = manifest(20, 20, "train/").replace(
        {"path": {"^train/.*/": "train/male/Val/"}}, regex=True
    )
    assert len(predefined(frame, manifest(5, 5, "test/"))["validation"]) == 8


@pytest.mark.parametrize(
    ("train", "test"),
    [("training_set", "test_set"), ("Train ", "Test "), ("Training Data", "testing-data")],
)
def test_split_folders_are_named_as_people_name_them(train: str, test: str) -> None:
    parts = predefined(manifest(20, 20, f"{train}/"), manifest(5, 5, f"{test}/"))
    assert [len(parts[name]) for name in SPLITS] == [32, 8, 10]


def test_a_training_image_that_is_in_test_too_is_removed_from_train() -> None:
    frame = pd.concat([manifest(20, 20, "train/"), manifest(5, 5, "test/")], ignore_index=True)
    parts = split_by_folder(frame, validation_fraction=0.2, seed=1)
    assert len(parts["test"]) == 10
    assert len(parts["train"]) + len(parts["validation"]) == 30
    seen = np.concatenate([parts["train"]["sha256"], parts["validation"]["sha256"]])
    assert not set(seen) & set(parts["test"]["sha256"])
    assert len(find_leaks(frame)) == 10
    assert find_leaks(frame)["train/male/0003.jpg"] == (
        "is in train, and 'test/male/0003.jpg' shows the same"
    )


@pytest.mark.parametrize("folder", ["", "train/"])
def test_missing_predefined_folders_are_a_clear_error(folder: str) -> None:
    with pytest.raises(UserError, match=r"split\.predefined=false"):
        predefined(manifest(5, 5, folder))


def persons(folder: str = "") -> pd.DataFrame:
    frame = manifest(90, 90, folder)
    frame["person"] = [f"{row.label}-{n % 90 // 3}" for n, row in enumerate(frame.itertuples())]
    return frame


def groups_of(frame: pd.DataFrame) -> pd.Series:
    return pd.Series(frame["sha256"].to_numpy(), index=frame["path"])


def test_a_person_stays_in_one_split_and_sizes_count_images() -> None:
    frame = persons()
    # A picture under two names joins both; one without a name stands for itself.
    groups = groups_of(frame)
    groups["male/0000.jpg"] = groups["male/0005.jpg"]
    frame.loc[frame["path"] == "female/0000.jpg", "person"] = None
    subjects = group_by_subject(frame, groups, "person")
    assert subjects["male/0001.jpg"] == subjects["male/0004.jpg"] == "subject 1-0"
    assert subjects["female/0000.jpg"] == "female0000"
    parts = split_at_random(
        frame,
        test_fraction=0.3,
        validation_fraction=0.15,
        seed=1,
        duplicate_groups=groups,
        subjects=subjects,
    )
    found = [set(part["path"].map(subjects)) for part in parts.values()]
    assert sum(map(len, found)) == len(set.union(*found)) == 60
    assert len(parts["test"]) == pytest.approx(54, abs=4)
    assert len(parts["validation"]) == pytest.approx(19, abs=4)


def test_a_subject_that_is_probably_none_is_named_and_case_makes_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    frame = persons()
    frame.loc[:1, "person"] = ["Anna", "anna"]
    subjects = group_by_subject(frame, groups_of(frame), "person")
    assert subjects[frame.loc[0, "path"]] == subjects[frame.loc[1, "path"]]
    assert caplog.messages == []
    frame.loc[frame.index[:19], "person"] = "Unknown"
    group_by_subject(frame, groups_of(frame), "person")
    (said,) = caplog.messages
    assert "19 of 180 image(s) have the person 'Unknown'" in said


def test_persons_of_both_labels_are_divided_as_well() -> None:
    frame = persons()
    frame["person"] = frame["person"].str[2:]
    subjects = group_by_subject(frame, groups_of(frame), "person")
    parts = split_at_random(
        frame, test_fraction=0.3, validation_fraction=0.15, seed=1, subjects=subjects
    )
    assert [len(parts[name]) for name in SPLITS] == [108, 18, 54]
    assert set(parts["test"]["label"]) == {0, 1}


def test_a_person_in_train_and_test_is_a_leak() -> None:
    frame = pd.concat([persons("train/"), persons("test/").iloc[:6]], ignore_index=True)
    frame["sha256"] = [f"image-{number}" for number in range(len(frame))]
    groups = groups_of(frame)
    groups["train/female/0001.jpg"] = groups["test/female/0001.jpg"]
    leaks = find_leaks(frame, groups, group_by_subject(frame, groups, "person"))
    assert list(leaks) == [f"train/female/000{n}.jpg" for n in range(6)]
    assert leaks["train/female/0001.jpg"].endswith("'test/female/0001.jpg' shows the same")
    assert leaks["train/female/0005.jpg"].endswith("'test/female/0003.jpg' is of the same subject")
    assert len(find_leaks(frame, groups)) == 1


# A user's column of one of the manifest's own names has a prefix: the manifest's is another column.
@pytest.mark.parametrize("column", ["who", "path", "label", "sha256"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(column: str) -> None:
    with pytest.raises(UserError, match=rf"group_by is {column}.*metadata: person\. Put a CSV"):
        group_by_subject(persons(), groups_of(persons()), column)
