import csv
import hashlib
import io
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facegender.data.sources import sample
from tests.conftest import read
from tools.compose_params import ROOT

PLAIN: dict[str, str | int] = {
    **{name: options[0] for name, options in sample.NUISANCE.items()},
    "hair": "shortFlat",
    "facial_hair": "none",
    "accessories": "none",
    "clothing": "shirtCrewNeck",
    "rotation_degrees": 0,
    "scale_percent": 110,
    "shift_x_percent": 0,
    "shift_y_percent": 9,
}


def draw(target: Path, **options: int) -> dict[str, bytes]:
    """Draw into the new directory `target` and return its files' bytes by name."""
    target.mkdir()
    sample.draw_sample(target, **({"per_class": 3, "image_size": 32, "seed": 7} | options))
    return read(target)


def pixels(**attributes: str | int) -> np.ndarray:
    """Return a picture as int16 (64, 64, 3), 0 to 255."""
    with Image.open(io.BytesIO(sample.render(PLAIN | attributes, 64))) as image:
        return np.asarray(image.convert("RGB"), np.int16)


def visible_difference(first: np.ndarray, second: np.ndarray) -> int:
    """Return in how many pixels two pictures differ by more than an eye overlooks."""
    return int((np.abs(first - second).max(axis=2) >= 16).sum())


def assert_all_differ(pictures: list[np.ndarray]) -> None:
    for pair in itertools.combinations(pictures, 2):
        assert visible_difference(*pair) >= 20


def test_the_number_of_processes_changes_no_byte(tmp_path: Path) -> None:
    # More pictures than a task holds, so that two processes have work.
    alone = draw(tmp_path / "alone", per_class=15, jobs=1)
    assert draw(tmp_path / "two", per_class=15, jobs=2) == alone
    assert len(alone) == 31


def test_a_larger_sample_holds_the_smaller(tmp_path: Path) -> None:
    small = draw(tmp_path / "small", per_class=2, jobs=1)
    large = draw(tmp_path / "large", per_class=3, jobs=1)
    rows = set(small.pop("metadata.csv").splitlines())
    assert rows < set(large.pop("metadata.csv").splitlines())
    assert small.items() < large.items()


def test_another_seed_draws_other_pictures(tmp_path: Path) -> None:
    one = draw(tmp_path / "one", jobs=1)
    other = draw(tmp_path / "other", seed=8, jobs=1)
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)


def test_pictures_have_the_size_asked_for(tmp_path: Path) -> None:
    for name, content in draw(tmp_path / "sample", per_class=1, image_size=48, jobs=1).items():
        if name.endswith(".png"):
            with Image.open(io.BytesIO(content)) as image:
                assert image.size == (48, 48)


def test_the_table_describes_each_picture(tmp_path: Path) -> None:
    content = draw(tmp_path / "sample", jobs=1)
    text = content["metadata.csv"].decode()
    assert "\r" not in text
    rows = list(csv.DictReader(text.splitlines()))
    assert list(rows[0]) == [
        "file",
        *sample.SIGNAL,
        "hair_length",
        "headwear",
        *sample.NUISANCE,
        *sample.PLACEMENT,
    ]
    assert [row["file"] for row in rows] == sorted(content.keys() - {"metadata.csv"})
    for row in rows:
        label, number = row["file"].removesuffix(".png").split("/")
        attributes = sample.draw_attributes(label, int(number), 7)
        assert {name: str(value) for name, value in attributes.items()} == {
            name: value for name, value in row.items() if name != "file"
        }
        assert sample.render(attributes, 32) == content[row["file"]]


def test_groups_follow_the_hair() -> None:
    drawn = [sample.draw_attributes(label, i, 1) for label in sample.CLASSES for i in range(500)]
    groups = {str(row["hair"]): (row["hair_length"], row["headwear"]) for row in drawn}
    assert groups["straight01"] == ("long", "no")
    assert groups["shortFlat"] == ("short", "no")
    assert groups["hijab"] == ("covered", "yes")
    assert sample.SIGNAL["hair"].keys() > sample.HEADWEAR | sample.SHORT_HAIR


def test_a_directory_with_a_sample_is_not_drawn_over(tmp_path: Path) -> None:
    draw(tmp_path / "sample", jobs=1)
    with pytest.raises(FileExistsError):
        sample.draw_sample(tmp_path / "sample", per_class=1, image_size=32, seed=1, jobs=1)


def test_no_two_of_the_default_pictures_are_alike() -> None:
    # Whether attributes differ where nothing shows is seen from the pictures alone. Small ones
    # are likelier to coincide than those of the default size.
    digests = {
        hashlib.sha256(sample.render(sample.draw_attributes(label, i, 42), 32)).digest()
        for label in sample.CLASSES
        for i in range(600)
    }
    assert len(digests) == 1200


def test_the_tables_add_up_and_name_what_the_style_has() -> None:
    # DiceBear draws nothing for a name that it does not know.
    components = sample._style().components()
    for name, component in sample._COMPONENTS.items():
        values = sample.SIGNAL.get(name) or sample.NUISANCE[name]
        known = set(components[component].variants())
        assert set(values) - {"none"} <= known
        assert "none" not in values or name in {"facial_hair", "accessories"}
    for values in sample.SIGNAL.values():
        assert np.sum(list(values.values()), axis=0) == pytest.approx([100, 100], abs=1e-9)


def test_the_classes_overlap_in_every_value() -> None:
    assert all(min(pair) > 0 for values in sample.SIGNAL.values() for pair in values.values())


def test_bayes_accuracy_of_one_attribute_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {
        "hair": {"hijab": (50, 25), "bob": (50, 75)},
        "clothing": {"a": (90, 20), "b": (10, 80)},
    }
    monkeypatch.setattr(sample, "SIGNAL", tables)
    assert sample.bayes_accuracy(["hair"]) == pytest.approx((0.5 + 0.75) / 2)
    # A hijab hides the clothing: (hijab) 0.5; (bob, a) 0.45; (bob, b) 0.6.
    assert sample.bayes_accuracy() == pytest.approx((0.5 + 0.45 + 0.6) / 2)


def test_bayes_accuracy_is_that_of_the_best_classifier_on_draws() -> None:
    count = 6000
    right = 0
    for column, label in enumerate(sample.CLASSES):
        for index in range(count):
            drawn = sample.draw_attributes(label, index, 3)
            likelihood = np.ones(2)
            for name, values in sample.SIGNAL.items():
                if drawn[name] != sample.COVERED:
                    likelihood *= values[str(drawn[name])]
            right += int(likelihood.argmax() == column)
    accuracy = sample.bayes_accuracy()
    error = (accuracy * (1 - accuracy) / (2 * count)) ** 0.5
    assert right / (2 * count) == pytest.approx(accuracy, abs=4 * error)


def test_draws_follow_the_tables_and_nuisance_is_alike_in_both_classes() -> None:
    count = 4000
    drawn = [
        [sample.draw_attributes(label, i, 5) for i in range(count)] for label in sample.CLASSES
    ]

    def off(share: float, expected: float) -> float:
        return abs(share - expected) / (expected * (1 - expected) / count) ** 0.5

    expected: dict[tuple[str, str | int], tuple[float, float]] = {}
    for name, options in sample.NUISANCE.items():
        expected |= {(name, value): (1 / len(options),) * 2 for value in options}
    for name, (first, last) in sample.PLACEMENT.items():
        span = range(first, last + 1)
        expected |= {(name, value): (1 / len(span),) * 2 for value in span}
    for name in ("hair", "facial_hair", "accessories"):
        for value, (female, male) in sample.SIGNAL[name].items():
            expected[name, value] = (female / 100, male / 100)
    counts = [Counter(item for row in rows for item in row.items()) for rows in drawn]
    # 4.5 standard errors: with some 250 comparisons, chance alone goes there once in 600 seeds.
    for item, shares in expected.items():
        for column, share in enumerate(shares):
            assert off(counts[column][item] / count, share) < 4.5, (item, sample.CLASSES[column])
    # And nothing is drawn that no table has.
    tables = {*sample.SIGNAL, *sample.NUISANCE, *sample.PLACEMENT} - {"clothing"}
    assert {item for both in counts for item in both if item[0] in tables} <= expected.keys()


# What makes the Bayes accuracy exact is that each value shows in the picture, whatever else is
# drawn, or is recorded as covered.


@pytest.mark.parametrize("hair", [hair for hair in sample.SIGNAL["hair"] if hair != "hijab"])
def test_clothing_shows_below_hair_and_beard(hair: str) -> None:
    for scale, shift in ((98, 5), (110, 9)):
        others = {"hair": hair, "scale_percent": scale, "shift_y_percent": shift}
        assert_all_differ(
            [
                pixels(**others, facial_hair="beardMajestic", clothing=clothing)
                for clothing in sample.SIGNAL["clothing"]
            ]
        )


def test_a_hijab_covers_the_clothing() -> None:
    drawn = [sample.draw_attributes("female", index, 42) for index in range(300)]
    covered = [row for row in drawn if row["clothing"] == sample.COVERED]
    assert covered == [row for row in drawn if row["hair"] == "hijab"]
    assert covered
    first, second = (pixels(hair="hijab", clothing=c) for c in ("hoodie", "shirtScoopNeck"))
    assert visible_difference(first, second) <= 5


@pytest.mark.parametrize("skin_color", sample.NUISANCE["skin_color"])
@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("hair", {}),
        ("accessories", {}),
        *(("facial_hair", {"hair_color": color}) for color in sample.NUISANCE["hair_color"]),
        *(("clothing", {"clothing_color": color}) for color in sample.NUISANCE["clothing_color"]),
    ],
)
def test_each_value_shows_on_every_skin(name: str, others: dict[str, str], skin_color: str) -> None:
    others = {"skin_color": skin_color, **others}
    assert_all_differ([pixels(**others, **{name: value}) for value in sample.SIGNAL[name]])


def test_the_version_names_packages_and_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    version = sample.version()
    for part in ("avataaars 1", "dicebear-core 1", "resvg-py 0", "distributions "):
        assert part in version
    monkeypatch.setattr(sample, "PLACEMENT", {**sample.PLACEMENT, "scale_percent": (98, 111)})
    assert sample.version() != version


def test_the_documentation_has_the_tables_of_the_code() -> None:
    text = (ROOT / "docs" / "sample-data.md").read_text("utf-8")
    assert sample.describe() in text
    assert f"{sample.bayes_accuracy():.4f}" in text.split("## ")[0]
