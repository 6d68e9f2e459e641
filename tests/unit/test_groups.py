"""Groups of the metadata, and how they differ from the rest."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from facegender.errors import UserError
from facegender.evaluation.groups import (
    OTHER,
    find_groups,
    group_metrics,
    group_names,
    ratio_interval,
)
from facegender.evaluation.plots import group_accuracy


def test_rare_values_of_many_are_one_group() -> None:
    values = pd.Series(["de"] * 30 + ["fr"] * 20 + [f"c{number}" for number in range(25)] + [None])
    names = group_names(values, minimum=20)
    assert names.value_counts().to_dict() == {"de": 30, "fr": 20, OTHER: 25}
    assert names.isna().sum() == 1
    found = find_groups(pd.DataFrame({"country": values}), None, 20)
    assert list(found.left_out) == [
        "country: missing for 1 images",
        f"country: 25 rare values are one group, {OTHER}",
    ]
    # As many as fit beside OTHER.
    assert len(set(group_names(pd.Series([*"abcdefghijklmnopqrstuvwxy"] * 2), minimum=2))) == 20
    # Few values are all groups, however small.
    assert set(group_names(pd.Series(["a", "b", "b"]), minimum=20)) == {"a", "b"}


def test_a_value_is_a_group_unless_all_images_share_it() -> None:
    table = pd.DataFrame({"country": ["de", "de", None], "source": "web"})
    found = find_groups(table, None, 1)
    assert [name[:2] for name in found.members] == [("country", "de")]
    left_out = ["country: missing for 1 images", "source: one group only, web"]
    assert list(found.left_out) == left_out


@pytest.mark.parametrize(
    ("values", "count", "first", "last"),
    [
        (np.linspace(0, 0.999, 500), 20, "0.00 to 0.05", "0.95 to 1.00"),
        (np.arange(20), 20, "0", "19"),
        (np.arange(21), 3, "0-9", "20-29"),
        (np.arange(0, 117), 12, "0-9", "110-119"),
        (np.arange(0, 5000, 7), 10, "0-499", "4500-4999"),
        (np.arange(-1, 1, 0.01), 20, "-0.1 to 0.0", "0.9 to 1.0"),
    ],
)
def test_numbers_are_cut_into_round_bands(
    values: np.ndarray, count: int, first: str, last: str
) -> None:
    names = set(group_names(pd.Series(values)))
    assert len(names) == count
    assert {first, last} <= names


def test_decimal_commas_are_numbers_and_separators_of_thousands_are_not() -> None:
    numbers = pd.Series([f"{number},5" for number in range(40)])
    assert set(group_names(numbers)) == {f"{ten} to {ten + 10}" for ten in (0, 10, 20, 30)}
    thousands = pd.Series([f"{number},000" for number in range(40)])
    assert set(group_names(thousands, minimum=2)) == {OTHER}


def test_the_word_that_keeps_numbers_from_bands_is_named() -> None:
    ages = pd.Series([*map(str, range(30)), "unknown"])
    found = find_groups(pd.DataFrame({"age": ages}), None, 2)
    assert list(found.left_out) == [
        f"age: 31 rare values are one group, {OTHER}, because 'unknown' is not a number"
    ]


def test_columns_are_chosen_and_crossed_or_refused() -> None:
    table = pd.DataFrame({"age": ["y", "o", "o", "y"], "sex": ["f", "f", "m", None], "x": 1})
    found = find_groups(table, [["age", "sex"]], 1)
    names = {(column, group): members.tolist() for column, group, members in found.members}
    assert names[("age x sex", "o, m")] == [False, False, True, False]
    assert len(names) == 3
    assert list(found.left_out) == ["not in evaluate.groups: x", "sex: missing for 1 images"]
    with pytest.raises(UserError, match="names hat, shoe, which the metadata lack; they have"):
        find_groups(table, ["shoe", "hat"], 1)


def test_no_two_crossed_groups_have_one_name() -> None:
    table = pd.DataFrame({"town": ["Paris, France", "Paris", 'a"'], "sex": ["f", "France, f", "m"]})
    found = find_groups(table, [["town", "sex"]], 1)
    assert [group for _, group, _ in found.members] == [
        '"Paris, France", f',
        '"a""", m',
        'Paris, "France, f"',
    ]


def test_a_group_is_compared_with_the_rest() -> None:
    right = np.arange(100) >= 12  # 10 of 40 wrong in a, 2 of 60 in b
    right[10:12], right[40:42] = True, False
    table = pd.DataFrame({"label": 1, "probability": np.where(right, 0.9, 0.1)})
    table["g"] = np.where(np.arange(100) < 40, "a", "b")
    found = group_metrics(table, threshold=0.5, minimum=40).set_index("group")
    assert not found["small"].any()
    assert found["accuracy"].to_dict() == pytest.approx({"a": 30 / 40, "b": 58 / 60})
    assert found["recall_male"].to_dict() == pytest.approx({"a": 30 / 40, "b": 58 / 60})
    assert found["recall_female"].isna().all()
    assert (found["accuracy_low"] < found["accuracy"]).all()
    assert (found["accuracy"] < found["accuracy_high"]).all()
    assert found.loc["a", "difference"] == pytest.approx(30 / 40 - 58 / 60)
    assert found.loc["a", "error_ratio"] == pytest.approx((10 / 40) / (2 / 60))
    assert found.loc["a", "difference_high"] < 0 < found.loc["b", "difference_low"]
    assert found.loc["a", "error_ratio_low"] > 1
    # Both rows are one test; Holm doubles it.
    assert found["p"].nunique() == 1
    assert 0.002 < found.loc["a", "p"] < 0.008
    none = group_metrics(table.drop(columns="g"), threshold=0.5, minimum=20)
    assert (len(none), set(none)) == (0, {"group", *found})


def test_the_interval_of_a_ratio_is_the_inverse_of_that_of_its_inverse() -> None:
    low, high = ratio_interval((30, 40), (50, 60))
    assert low < (30 / 40) / (50 / 60) < high
    assert ratio_interval((50, 60), (30, 40)) == pytest.approx((1 / high, 1 / low))
    assert ratio_interval((0, 40), (50, 60))[0] == 0
    assert ratio_interval((30, 40), (0, 60))[1] == np.inf
    # Few errors: the ends of Wilson's interval of 6 of 346 are 0.0080 and 0.0373.
    low, high = ratio_interval((2, 14), (6, 346))
    assert (low, high) == pytest.approx((1.9150, 30.3075), abs=1e-4)
    assert ratio_interval((6, 346), (2, 14)) == pytest.approx((1 / high, 1 / low))
    low, high = ratio_interval((2, 14), (0, 346))
    assert ratio_interval((0, 346), (2, 14)) == pytest.approx((0, 1 / low))
    assert (ratio_interval((0, 40), (0, 60)), high) == ((0, np.inf), np.inf)


def test_dollar_signs_in_a_name_are_not_a_formula(tmp_path: Path) -> None:
    table = pd.DataFrame({"label": [0, 1], "probability": 0.1, "price": [r"$\frac$", "$1 to $2"]})
    group_accuracy(group_metrics(table, threshold=0.5, minimum=1), tmp_path / "groups.png")


@pytest.mark.filterwarnings("error")
def test_a_long_name_leaves_the_others_their_room(tmp_path: Path) -> None:
    # Matplotlib warned, and cut off every name at its start.
    long = "somewhere, " * 30
    table = pd.DataFrame({"label": [0, 1], "probability": 0.1, "place": [f"{long}1", f"{long}2"]})
    group_accuracy(group_metrics(table, threshold=0.5, minimum=1), tmp_path / "groups.png")
