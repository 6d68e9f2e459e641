import os
from pathlib import Path
from unittest.mock import Mock

import h5py
import keras
import numpy as np
import pytest

from facegender.errors import UserError
from facegender.inference.export import MAX_FLOAT_DIFFERENCE
from facegender.model.network import Network, set_trainable
from facegender.model.saved_model import save_model
from tests.networks import small_network


def network(**changes: object) -> Network:
    return small_network(**{"dropout": 0.5} | changes)


@pytest.fixture(scope="module")
def built() -> Network:
    return network()


def test_it_takes_plain_uint8_and_gives_a_probability(built: Network) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert built.inference().input.dtype == "uint8"
    probabilities = built.inference(slope=0.5, intercept=1.0).predict_on_batch(images)
    assert probabilities.shape == (3, 1)
    logits = built.training([]).predict_on_batch(images)
    np.testing.assert_allclose(
        probabilities, 1 / (1 + np.exp(-logits / 2 - 1)), atol=MAX_FLOAT_DIFFERENCE
    )


def test_scaling_is_inside_the_model(built: Network) -> None:
    scale = built.inference().get_layer("scale")
    ends = np.asarray(scale(np.array([[[[0, 127.5, 255]]]])))
    np.testing.assert_allclose(ends.ravel(), [-1, 0, 1], atol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
def test_the_same_weights_make_the_same_file(flip: bool, tmp_path: Path) -> None:
    for name in ("a.keras", "b.keras"):
        save_model(network(test_time_flip=flip).inference(), tmp_path / name)
    assert (tmp_path / "a.keras").read_bytes() == (tmp_path / "b.keras").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.keras", "b.keras"]


def trainable(built: Network) -> list[str]:
    return [layer.name for layer in built.trained_base.layers if layer.trainable and layer.weights]


@pytest.mark.parametrize(
    ("batch_norm", "last", "layers"),
    [("train", ["conv_pw_13", "conv_pw_13_bn"], 54), ("frozen", ["conv_pw_13"], 27)],
)
def test_fine_tuning_starts_at_the_layer_named(
    batch_norm: str, last: list[str], layers: int
) -> None:
    built = network(batch_norm=batch_norm)
    set_trainable(built.trained_base, "conv_pw_13")
    assert trainable(built) == last
    set_trainable(built.trained_base, "all")
    assert len(trainable(built)) == layers


def test_an_unknown_layer_is_a_clear_error(built: Network) -> None:
    with pytest.raises(UserError, match="conv_pw_13"):
        set_trainable(built.trained_base, "conv99")


@pytest.fixture
def worn() -> Network:
    """A network with frozen BatchNorm, whose statistics are no longer those of a new one."""
    built = network(batch_norm="train", dropout=0.0)
    built.training([]).compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    generator = np.random.default_rng(0)
    for layer in built.base.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([generator.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    return Network(
        built.base, image_size=32, batch_norm="frozen", dropout=0.0, test_time_flip=False, seed=1
    )


def test_folding_changes_no_output(worn: Network) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (4, 32, 32, 3)).astype("float32")
    expected = worn.base.predict_on_batch(images)
    assert expected.std() > 0.01
    assert not any("bn" in layer.name for layer in worn.trained_base.layers)
    np.testing.assert_allclose(
        worn.trained_base.predict_on_batch(images), expected, atol=MAX_FLOAT_DIFFERENCE
    )
    assert worn.trained_base.predict_on_batch(np.zeros((1, 64, 48, 3))).shape == expected[:1].shape


def test_what_was_trained_folded_is_saved_as_a_plain_mobilenet(
    worn: Network, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    first = worn.inference().predict_on_batch(images)
    model = worn.training([])
    model.compile(keras.optimizers.Adam(0.01), keras.losses.BinaryCrossentropy(from_logits=True))
    model.optimizer.build(model.trainable_variables)  # or TensorFlow traces the first step twice
    model.fit(images, np.zeros((8, 1)), epochs=2, verbose=0)
    save_model(worn.inference(), tmp_path / "a.keras")
    loaded = keras.models.load_model(tmp_path / "a.keras", compile=False)
    (mobilenet,) = (layer for layer in loaded.layers if isinstance(layer, keras.Model))
    plain = keras.applications.MobileNet((32, 32, 3), 0.25, include_top=False, weights=None)
    assert [type(layer) for layer in plain.layers] == [
        type(layer) for layer in mobilenet.layers[:-1]
    ]
    trained = 1 / (1 + np.exp(-model.predict_on_batch(images)))
    np.testing.assert_allclose(loaded.predict_on_batch(images), trained, atol=MAX_FLOAT_DIFFERENCE)
    assert np.abs(trained - first).max() > 0.01


def test_a_flip_at_test_time_is_the_mean_of_both_sides(tmp_path: Path) -> None:
    pixels = keras.Input((32, 32, 3))
    # Random weights a pixel, for those of a new MobileNet hardly tell one side from the other.
    base = keras.Model(pixels, keras.layers.Dense(4)(keras.layers.Flatten()(pixels)))
    settings = {"image_size": 32, "batch_norm": "train", "dropout": 0.0, "seed": 1}
    plain, flipping = (Network(base, test_time_flip=flip, **settings) for flip in (False, True))
    flipping.head.set_weights(plain.head.get_weights())
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    one, other = (plain.logits().predict_on_batch(x) for x in (images, images[:, :, ::-1]))
    assert np.abs(one - other).max() > 0.1
    mean = (one + other) / 2
    flipped = flipping.logits().predict_on_batch(images)
    np.testing.assert_allclose(flipped, mean, atol=MAX_FLOAT_DIFFERENCE)
    save_model(flipping.inference(), tmp_path / "a.keras")
    loaded = keras.models.load_model(tmp_path / "a.keras", compile=False)
    probabilities = loaded.predict_on_batch(images)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-mean)), atol=MAX_FLOAT_DIFFERENCE)


def test_a_missing_weights_file_is_a_clear_error() -> None:
    with pytest.raises(UserError, match=r"nowhere\.h5"):
        network(weights="nowhere.h5")


def test_weights_of_another_shape_are_a_clear_error(tmp_path: Path, built: Network) -> None:
    built.base.save_weights(tmp_path / "quarter.weights.h5")
    with pytest.raises(UserError, match=r"alpha 0\.5"):
        network(weights=str(tmp_path / "quarter.weights.h5"), alpha=0.5)


def test_weights_with_another_digest_are_refused(tmp_path: Path, built: Network) -> None:
    built.base.save_weights(tmp_path / "a.weights.h5")
    with pytest.raises(UserError, match="weights_sha256"):
        network(weights=str(tmp_path / "a.weights.h5"), weights_sha256="0" * 64)


def test_no_network_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Keras' own download, at an address where nothing listens.
    monkeypatch.setattr(
        "keras.src.applications.mobilenet.BASE_WEIGHT_PATH", "http://127.0.0.1:9/weights/"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"model\.weights=PATH"):
        network(weights="imagenet", image_size=128)


@pytest.mark.parametrize("trouble", ["a connection that breaks", "a download that was killed"])
def test_imagenet_weights_that_did_not_arrive_whole_are_not_called_unfit(
    trouble: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reset = ConnectionResetError(104, "Connection reset by peer")
    monkeypatch.setattr("keras.src.utils.file_utils.urlretrieve", Mock(side_effect=reset))
    monkeypatch.setattr("keras.src.backend.config.keras_home", lambda: str(tmp_path))
    if trouble == "a download that was killed":
        (tmp_path / "models").mkdir()
        truncated = tmp_path / "models" / "mobilenet_2_5_128_tf_no_top.h5"
        with h5py.File(truncated, "w") as file:
            file["weights"] = np.zeros(1000)
        os.truncate(truncated, 4000)
    with pytest.raises(UserError, match=r"downloaded or read \(.*delete the file there"):
        network(weights="imagenet", image_size=128)


def test_imagenet_weights_from_a_path(shared: Path) -> None:
    path = shared / "weights" / "mobilenet_1_0_224_tf_no_top.h5"
    loaded = network(weights=str(path), alpha=1.0, image_size=64)
    assert float(np.std(loaded.base.get_layer("conv1").kernel.numpy())) > 0.1
