import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import keras
import numpy as np
import pandas as pd
import pytest
from keras.src.legacy.preprocessing.image import ImageDataGenerator
from scipy.stats import ttest_1samp

from bench import notebook
from bench.recipes import (
    compare,
    decode_images,
    fold_images,
    mean_interval,
    share_difference_interval,
    share_interval,
    show,
    train,
    train_notebook,
    transfer,
)
from facegender.data.face_images import face_images
from facegender.data.processed import ProcessedSplit
from facegender.data.raw_manifest import build_manifest
from facegender.evaluation.metrics import paired_interval, wilson_interval
from facegender.faces.settings import crop_of
from facegender.model.saved_model import load_model, predict_arrays, save_model
from facegender.params import Params
from facegender.training import train as training
from tests.networks import shallow_network


@pytest.fixture
def images() -> pd.DataFrame:
    count = 120  # pairs of near duplicates
    return pd.DataFrame(
        {
            "path": [f"{index:03}.jpg" for index in range(count)],
            "label": [index // 2 % 2 for index in range(count)],
            "group": [str(index // 2) for index in range(count)],
        }
    )


def test_each_image_is_held_out_once_and_no_group_is_divided(
    images: pd.DataFrame, params: Params
) -> None:
    folds = fold_images(images, params, 4, seed=0)
    held = pd.concat([fold[fold["split"] == "test"] for fold in folds])
    assert sorted(held["path"]) == list(images["path"])
    for fold in folds:
        assert (fold.groupby("group")["split"].nunique() == 1).all()
        # 0.15 of what is not held out is for validation.
        assert fold["split"].value_counts().to_dict() == {"train": 76, "test": 30, "validation": 14}
        assert fold.groupby("split")["label"].mean().between(0.4, 0.6).all()
    assert not fold_images(images, params, 4, seed=1)[0].equals(folds[0])


def test_an_interval_counts_near_duplicates_as_one(images: pd.DataFrame) -> None:
    values = (np.arange(120) // 2 % 4 > 0).astype(float)  # 45 of 60 pairs
    assert share_interval(values, images["group"]) == pytest.approx(
        wilson_interval(45, 60), abs=0.002
    )
    change = values * np.where(np.arange(120) // 8 % 5 == 0, -1, 1)  # 9 of 60 pairs lost
    assert share_difference_interval(change, images["group"]) == pytest.approx(
        paired_interval(36, 9, 60), abs=0.002
    )
    # Without an error there is nothing to estimate a variance from.
    assert share_interval(np.ones(120), images["group"]) == wilson_interval(60, 60)
    assert share_difference_interval(0 * values, images["group"]) == paired_interval(0, 0, 60)
    found = ttest_1samp(values[::2], 0).confidence_interval()
    assert mean_interval(values, images["group"]) == pytest.approx(tuple(found))


def test_figures_and_differences(images: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    # Half of the males get 0.2: a third of the 90 images there is male, so the ECE is 0.15.
    labels = images["label"].to_numpy()
    wrong = np.arange(len(images)) % 4 == 3
    first = images.assign(
        probability=np.where(labels ^ wrong, 0.8, 0.2), loss=0.5, training="a", seconds=10.0
    )
    other = first.assign(probability=np.where(labels, 0.8, 0.2), loss=0.3)
    for table in (first.assign(group=first["path"]), first):
        show("one", table)
        compare(other.assign(group=table["group"]), table)
    shown, compared, *grouped = capsys.readouterr().out.splitlines()
    assert shown.startswith("one: accuracy 0.7500 (0.6")
    assert shown.endswith("log loss 0.5000, ece 0.1500, seconds 10 (10 to 10)")
    assert "log loss -0.2000 (-0.2000 to -0.2000), accuracy +0.2500 (+0.1" in compared
    # Sixty groups are too few for an interval.
    assert grouped == [
        "one: accuracy 0.7500 (no interval from 60 groups), log loss 0.5000, ece 0.1500, "
        "seconds 10 (10 to 10)",
        "  less the first: log loss -0.2000 (no interval from 60 groups), "
        "accuracy +0.2500 (no interval from 60 groups)",
    ]


def test_each_model_is_judged_on_all_images_of_another_folder(
    part: ProcessedSplit, tmp_path: Path
) -> None:
    expected = {}
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        model = shallow_network(seed=seed).inference()
        save_model(model, tmp_path / name / "model.keras")
        expected[name] = predict_arrays(model, part.batches(32))
    other = ProcessedSplit(part.directory)
    other.index["group"] = "g"
    rows = transfer(tmp_path, {"a": 1.0, "b": 2.0}, other)
    assert len(rows) == 2 * len(part)
    for name, table in rows.groupby("training"):
        assert list(table["path"]) == list(part.index["path"])
        assert table["probability"].to_numpy() == pytest.approx(expected[name], abs=1e-6)
    assert set(rows["group"]) == {"g"}
    assert set(rows["seconds"]) == {1.0, 2.0}


def test_a_candidate_that_crops_gets_faces_and_another_gets_whole_pictures(
    shared: Path, params: Params, tmp_path: Path
) -> None:
    folder = shared / "faces"
    manifest = build_manifest(folder, female=["female"], male=["male"], ignore=[])[::30]
    whole = params.image.model_copy(update={"size": 64})
    for image in (whole, whole.model_copy(update={"face": "crop"})):
        for _ in range(2):  # the second time from the results
            pixels = decode_images(manifest, folder, tmp_path, image)
            for row, path in enumerate(manifest["path"]):
                expected = face_images(folder / path, 64, crop_of(image))[0][1]
                np.testing.assert_array_equal(pixels.images[row], expected)
    assert len(list(tmp_path.glob("images-64-*"))) == 2


@pytest.fixture
def folder(part: ProcessedSplit, params: Params, tmp_path: Path) -> Path:
    """Return the folder of a training whose splits are all the same."""
    folder = tmp_path / "training"
    folder.mkdir()
    for name in ("train", "validation", "test"):
        (folder / name).symlink_to(part.directory)
    (folder / "params.json").write_text(params.to_json())
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning:keras.src.legacy")
def test_the_notebook_learns_from_all_but_the_test_split(
    folder: Path, part: ProcessedSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def new_model(weights: str) -> keras.Model:
        layers = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(1)]
        model = keras.Sequential(layers)
        model.compile(loss="mse", metrics=["accuracy"])
        return model

    class Generator(ImageDataGenerator):
        def flow(self, images: np.ndarray, labels: np.ndarray, **options: int) -> Iterator:
            np.testing.assert_array_equal(labels, np.tile(part.labels, 2))
            np.testing.assert_array_equal(images, np.tile(part.images, (2, 1, 1, 1)))
            return super().flow(images, labels, **options)

    monkeypatch.setattr(notebook, "new_model", new_model)
    monkeypatch.setattr(notebook, "ImageDataGenerator", Generator)
    monkeypatch.setattr(notebook, "EPOCHS", 2)
    train_notebook(folder)
    done = json.loads((folder / "done.json").read_text())
    model = load_model(folder / "model.keras")
    assert done["probabilities"] == pytest.approx(predict_arrays(model, part.batches(32)))
    assert done["seconds"] > 0
    assert (done["slope"], done["intercept"]) == (1, 0)  # which bench.calibration reads


def test_an_interrupted_training_goes_on_and_has_no_seconds(
    folder: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = params.train.model_copy(update={"epochs": 2, "warmup_epochs": 0})
    small = params.image.model_copy(update={"size": 32})
    changed = params.model_copy(update={"image": small, "train": short})
    (folder / "params.json").write_text(changed.to_json())

    monkeypatch.setattr(training, "new_network", lambda params: shallow_network())

    stop = Mock(side_effect=InterruptedError)
    whole = training.train_network
    with monkeypatch.context() as patched:
        patched.setattr(training, "train_network", partial(whole, on_epoch=stop))
        with pytest.raises(InterruptedError):
            train(folder)
    assert not (folder / "done.json").exists()
    train(folder)
    assert len(pd.read_csv(folder / "history.csv")) == 2
    assert math.isnan(json.loads((folder / "done.json").read_text())["seconds"])
    assert not (folder / "checkpoint.npz").exists()
