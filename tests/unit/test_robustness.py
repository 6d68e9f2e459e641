import numpy as np
import pandas as pd
import pytest

from facegender.data.processed import ProcessedSplit
from facegender.evaluation.metrics import paired_interval
from facegender.evaluation.robustness import CHANGES, Change, robustness_table

BY_NAME = {change.name: change for change in CHANGES}


def changed(change: Change, pixels: np.ndarray) -> np.ndarray:
    return change.apply(pixels, np.random.default_rng(0))


@pytest.fixture
def pixels() -> np.ndarray:
    # Stripes of one pixel on a ramp: detail that blur, JPEG and half the resolution take away.
    ramp = np.linspace(40, 200, 64)[:, None] + 40 * (np.arange(64) % 2)
    return np.repeat(ramp[:, :, None], 3, axis=2).astype(np.uint8)


@pytest.mark.parametrize("change", CHANGES, ids=list(BY_NAME))
def test_each_change_makes_another_picture_of_the_same_kind(
    change: Change, pixels: np.ndarray
) -> None:
    other = changed(change, pixels)
    assert (other.shape, other.dtype) == (pixels.shape, np.uint8)
    assert np.abs(other.astype(int) - pixels).mean() > 5
    np.testing.assert_array_equal(other, changed(change, pixels))


def test_the_changes_do_what_their_names_say(pixels: np.ndarray) -> None:
    assert changed(BY_NAME["darker"], pixels).mean() == pytest.approx(pixels.mean() / 2, abs=1)
    assert changed(BY_NAME["brighter"], pixels).max() == 255
    for name in ("blur", "half_resolution"):
        detail = np.abs(np.diff(changed(BY_NAME[name], pixels).astype(int), axis=1))
        assert detail[:, 4:-4].mean() < 10, name
    grey = np.full((64, 64, 3), 128, np.uint8)
    noise = changed(BY_NAME["noise"], grey).astype(int) - 128
    assert noise.std() == pytest.approx(0.18 * 255, rel=0.03)


def judge(split: ProcessedSplit) -> pd.DataFrame:
    # Brightness tells the classes of these images, and the limit is between them.
    means = split.images.mean((1, 2, 3))[split.rows]
    limit = (means[split.labels == 0].max() + means[split.labels == 1].min()) / 2

    def predict(images: np.ndarray) -> np.ndarray:
        return np.where(images.mean((1, 2, 3)) > limit, 0.9, 0.1)

    clean = predict(split.read(np.arange(len(split))))
    return robustness_table(split, predict, clean, threshold=0.5, batch_size=7, seed=3).set_index(
        "change"
    )


def test_the_table_compares_with_the_clean_pictures(part: ProcessedSplit) -> None:
    table = judge(part)
    assert list(table.index) == list(BY_NAME)
    assert (table["n"] == 40).all()
    # Half as bright, all males count as females.
    assert table.loc["darker", "accuracy"] == 0.5
    assert table.loc["darker", "difference"] == -0.5
    interval = tuple(table.loc["darker", ["difference_low", "difference_high"]])
    assert interval == paired_interval(0, 20, 40)
    assert table.loc["blur", ["accuracy", "difference"]].tolist() == [1, 0]
    assert table.loc["blur", "difference_low"] < 0 < table.loc["blur", "difference_high"]


def test_batches_make_no_difference(part: ProcessedSplit) -> None:
    def seen(batch_size: int, seed: int) -> np.ndarray:
        batches: list[np.ndarray] = []

        def predict(images: np.ndarray) -> np.ndarray:
            batches.append(images)
            return np.zeros(len(images))

        clean = np.zeros(len(part))
        robustness_table(part, predict, clean, threshold=0.5, batch_size=batch_size, seed=seed)
        return np.concatenate(batches)

    np.testing.assert_array_equal(seen(7, seed=3), seen(40, seed=3))
    assert (seen(7, seed=3) != seen(7, seed=4)).any()
