import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import keras
import numpy as np
import pytest
import tensorflow as tf

from facegender.data.preprocessing import write_split
from facegender.data.processed import ProcessedSplit
from facegender.data.raw_manifest import build_manifest
from facegender.errors import UserError
from facegender.model.network import Network
from facegender.model.saved_model import predict_arrays, save_model
from facegender.params import Augmentation, Params, Train
from facegender.training.augmentation import augmentation_layers
from facegender.training.batches import make_batches
from facegender.training.checkpoints import Checkpoint
from facegender.training.train import (
    HISTORY_COLUMNS,
    Training,
    _small_size,
    train_network,
    with_global_batch_size,
)
from tests.networks import shallow_network


@pytest.fixture
def recipe(params: Params) -> Train:
    changes = {"epochs": 2, "batch_size": 16, "warmup_epochs": 0, "learning_rate": 0.01}
    return params.train.model_copy(update=changes)


def fit(part: ProcessedSplit, recipe: Train, momentum: float = 0.9) -> tuple[Network, Training]:
    network = shallow_network(
        dropout=0.2, seed=recipe.seed, batch_norm=recipe.batch_norm, batch_norm_momentum=momentum
    )
    return network, train_network(network, part, part, recipe, verbose=0)


def test_wide_images_are_cut_at_random_the_same_way_again(
    part: ProcessedSplit, recipe: Train
) -> None:
    plain = fit(part, recipe)[1].history
    border = ((0, 0), (3, 3), (3, 3), (0, 0))
    np.save(part.directory / "wide.npy", np.pad(part.images, border, mode="edge"))
    first, again = (fit(ProcessedSplit(part.directory), recipe)[1].history for _ in range(2))
    assert first.equals(again)
    assert (first["loss"] != plain["loss"]).all()


def test_history_and_the_kept_epoch(part: ProcessedSplit, recipe: Train) -> None:
    seen: list[int] = []
    network = shallow_network()
    two_phases = recipe.model_copy(update={"head_epochs": 2, "epochs": 3})
    training = train_network(
        network,
        part,
        part,
        two_phases,
        on_epoch=lambda epoch, metrics, ended: seen.append(epoch),
        verbose=0,
    )
    assert list(training.history.columns) == HISTORY_COLUMNS
    assert list(training.history["epoch"]) == seen == [1, 2, 3, 4, 5]
    assert training.history.notna().all(axis=None)
    assert (training.speed["images_per_second"] > 0).all()
    # The head's epochs are no rivals of those of fine-tuning.
    losses = training.history.set_index("epoch")["val_loss"]
    kept = training.history.loc[training.history["kept"] == 1, "epoch"]
    assert kept.tolist() == [training.kept_epoch]
    best = losses.loc[3:].min()
    assert training.kept_epoch > 2
    assert losses[training.kept_epoch] == best
    # The network is left with the best epoch's weights, not the last one's.
    probabilities = predict_arrays(network.inference(), part.batches(16))
    loss = -np.log(np.where(part.labels == 1, probabilities, 1 - probabilities)).mean()
    assert loss == pytest.approx(best, abs=1e-4)


def test_it_learns_what_is_easy(part: ProcessedSplit, recipe: Train) -> None:
    # Few steps, so the running statistics of BatchNorm must be quick.
    network, _ = fit(part, recipe.model_copy(update={"epochs": 20}), momentum=0.5)
    predicted = predict_arrays(network.inference(), part.batches(16)) >= 0.5
    assert (predicted == part.labels).mean() > 0.9


FOLDED = {
    "head_epochs": 3,
    "batch_norm": "frozen",
    "epochs": 3,
    "min_steps_per_epoch": 7,
    "small_image_size": 32,
    "small_epochs": 2,
    "ema_epochs": 1,
    "weight_decay": 0.01,
    "label_smoothing": 0.05,
}


def test_all_that_the_best_recipe_does_gives_the_same_bytes(
    part: ProcessedSplit, recipe: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[range, int | None]] = []

    def spy(*args: object, epochs: range = range(1), size: int | None = None, **rest: object):
        if "shuffle_seed" in rest:  # the training split is shuffled, the validation split is not
            asked.append((epochs, size))
        return make_batches(*args, epochs=epochs, size=size, **rest)

    monkeypatch.setattr("facegender.training.train.make_batches", spy)
    changed = Train.model_validate(recipe.model_dump() | FOLDED)
    for name in "ab":
        network, training = fit(part, changed)
        save_model(network.inference(1.5), tmp_path / f"{name}.keras")
        assert list(training.history["epoch"]) == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "a.keras").read_bytes() == (tmp_path / "b.keras").read_bytes()
    # Small images come first. Three steps a pass (40 images in batches of 16), so few images come
    # again: three passes for seven steps.
    assert asked == [(range(0, 6), 32), (range(6, 9), None)] * 2


@pytest.mark.parametrize(
    ("changes", "image_size", "small", "warned"),
    [
        ({}, 40, 32, False),
        ({}, 31, None, False),  # never enlarged
        ({"epochs": 2}, 40, 32, True),
    ],
)
def test_small_images_leave_epochs_for_full_ones_or_it_is_said(
    recipe: Train,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, int],
    image_size: int,
    small: int | None,
    warned: bool,
) -> None:
    changed = Train.model_validate(recipe.model_dump() | FOLDED | changes)
    assert _small_size(changed, image_size) == small
    assert ("lower it as well" in caplog.text) == warned


def test_small_images_without_frozen_batch_norm_are_refused(recipe: Train) -> None:
    with pytest.raises(ValueError, match="frozen"):
        Train.model_validate(recipe.model_dump() | FOLDED | {"batch_norm": "train"})


def test_no_epochs_leave_the_first_weights(part: ProcessedSplit, recipe: Train) -> None:
    network, training = fit(part, recipe.model_copy(update={"epochs": 0}))
    assert training.kept_epoch == 0
    assert list(training.history.columns) == HISTORY_COLUMNS
    assert len(predict_arrays(network.inference(), part.batches(16))) == 40


def test_early_stopping_and_class_weights(part: ProcessedSplit, recipe: Train) -> None:
    changes = {
        "epochs": 30,
        "early_stopping_patience": 1,
        "class_weights": "balanced",
        "learning_rate": 1e-7,
        "schedule": "constant",
    }
    _, training = fit(part, recipe.model_copy(update=changes))
    assert len(training.history) < 30
    assert training.history["learning_rate"].nunique() == 1


def test_early_stopping_keeps_the_averaged_weights(part: ProcessedSplit, recipe: Train) -> None:
    changes = {
        "epochs": 30,
        "early_stopping_patience": 1,
        "min_steps_per_epoch": 6,
        "ema_epochs": 1,
        "keep": "last",
        "learning_rate": 0.03,
    }
    network, training = fit(part, recipe.model_copy(update=changes))
    assert len(training.history) < 30
    assert training.history["kept"].tolist() == [0] * (len(training.history) - 1) + [1]
    probabilities = predict_arrays(network.inference(), part.batches(16))
    right = np.where(part.labels == 1, probabilities, 1 - probabilities)
    last = training.history["val_loss"].iloc[-1]
    assert -np.log(right.clip(1e-7)).mean() == pytest.approx(last, rel=1e-3)


@pytest.mark.parametrize("head_epochs", [0, 2])
def test_a_training_that_diverges_names_the_epoch_and_keeps_its_checkpoint(
    part: ProcessedSplit, recipe: Train, tmp_path: Path, head_epochs: int
) -> None:
    path = tmp_path / "checkpoint.npz"

    def diverge(epoch: int, metrics: dict, ended: int) -> None:
        if epoch == 1:
            network.head.set_weights([weight * np.nan for weight in network.head.get_weights()])

    network = shallow_network()
    diverging = recipe.model_copy(update={"epochs": 4, "head_epochs": head_epochs})
    with pytest.raises(UserError, match="diverged in epoch 2: loss is nan"):
        train_network(
            network, part, part, diverging, on_epoch=diverge, checkpoint=Checkpoint(path), verbose=0
        )
    saved = Checkpoint(path).saved
    assert [row["epoch"] for row in saved.notes["history"]] == [1]
    assert all(np.isfinite(array).all() for array in saved.arrays.values())


def test_augmentation_changes_training_images_only() -> None:
    names = ["zoom", "width_shift", "height_shift", "rotation", "brightness", "contrast"]
    everything = Augmentation(**dict.fromkeys(names, 0.2), horizontal_flip=True)
    nothing = Augmentation(**dict.fromkeys(names, 0.0), horizontal_flip=False)
    assert augmentation_layers(nothing, 1) == []
    assert len(augmentation_layers(everything, 1)) == 6
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    for layer in augmentation_layers(everything, 1):
        np.testing.assert_array_equal(layer(images, training=False), images)
        assert (np.asarray(layer(np.tile(images, (8, 1, 1, 1)), training=True))[:2] != images).any()


def test_undecodable_images_are_left_out_whatever_the_number_of_processes(
    make_images, tmp_path: Path
) -> None:
    raw = make_images(per_class=70)  # more than a chunk, so that rows of several tasks are mixed
    (raw / "female" / "005.png").write_bytes(b"not an image")
    (raw / "male" / "069.png").write_bytes((raw / "male" / "001.png").read_bytes()[:60])
    manifest = build_manifest(raw, female=["female"], male=["male"], ignore=[])
    for jobs in (1, 2):
        folder = tmp_path / str(jobs)
        failed = write_split(manifest, raw, folder, size=32, name="train", jobs=jobs)
        assert [item["path"] for item in failed] == ["female/005.png", "male/069.png"]
        assert failed[0]["reason"] == "not an image in a known format"
    part = ProcessedSplit(tmp_path / "2")
    assert len(part) == 138
    images = np.concatenate(list(part.batches(32)))
    np.testing.assert_array_equal(images.mean((1, 2, 3)) > 127, part.labels)
    for name in ("images.npy", "index.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize(
    "batch_norm", ["frozen", pytest.param("train", marks=pytest.mark.campaign)]
)
def test_mixed_precision_leaves_a_model_in_float32(
    part: ProcessedSplit, recipe: Train, tmp_path: Path, batch_norm: str
) -> None:
    def saved(mixed: bool) -> dict[str, bytes]:
        mixed_recipe = recipe.model_copy(
            update={"mixed_precision": mixed, "batch_norm": batch_norm, "epochs": 1}
        )
        try:
            network = shallow_network(batch_norm=batch_norm, mixed_precision=mixed)
        except UserError as error:
            pytest.skip(str(error))
        policies = {layer.compute_dtype for layer in network.trained_base.layers}
        assert ("bfloat16" in policies) == mixed
        history = train_network(network, part, part, mixed_recipe, verbose=0).history
        assert len(history) == 1
        assert np.isfinite(history["loss"]).all()
        save_model(network.inference(), tmp_path / "model.keras")
        with zipfile.ZipFile(tmp_path / "model.keras") as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    full, mixed = (saved(mixed) for mixed in (False, True))
    assert full["config.json"] == mixed["config.json"]
    assert full["model.weights.h5"] != mixed["model.weights.h5"]


def test_a_machine_without_bfloat16_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    error = tf.errors.AbortedError(None, None, "could not create a primitive descriptor")
    monkeypatch.setattr(keras.ops, "conv", Mock(side_effect=error))
    with pytest.raises(UserError, match=r"set train\.mixed_precision to false"):
        shallow_network(mixed_precision=True)


def test_a_batch_is_that_of_all_devices_or_of_each(recipe: Train) -> None:
    three = SimpleNamespace(num_replicas_in_sync=3)
    with pytest.raises(UserError, match="batch_size 16 cannot be divided among 3 devices"):
        with_global_batch_size(recipe, three)
    each = recipe.model_copy(update={"batch_per_device": True})
    assert with_global_batch_size(each, three).batch_size == 48
    assert with_global_batch_size(recipe, SimpleNamespace(num_replicas_in_sync=4)) == recipe
