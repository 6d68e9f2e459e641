from pathlib import Path

import keras
import numpy as np
import pytest

from facegender.errors import UserError
from facegender.model import Network, build_network, load_model, save_model, set_trainable
from facegender.training import make_deterministic


def network(**changes: object) -> Network:
    make_deterministic(1)
    settings = {
        "image_size": 32,
        "alpha": 0.25,
        "weights": "none",
        "dropout": 0.5,
        "seed": 1,
        "batch_norm_momentum": 0.9,
        "augmentation": [],
    }
    return build_network(**(settings | changes))


@pytest.fixture(scope="module")
def built() -> Network:
    return network()


def test_it_takes_plain_uint8_and_gives_a_probability(built: Network) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert built.inference.input.dtype == "uint8"
    probabilities = built.inference.predict_on_batch(images)
    assert probabilities.shape == (3, 1)
    logits = built.training.predict_on_batch(images)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_scaling_is_inside_the_model(built: Network) -> None:
    scale = built.inference.get_layer("scale")
    ends = np.asarray(scale(np.array([[[[0, 127.5, 255]]]])))
    np.testing.assert_allclose(ends.ravel(), [-1, 0, 1], atol=1e-6)


def test_the_same_weights_make_the_same_file(built: Network, tmp_path: Path) -> None:
    save_model(built.inference, tmp_path / "a.keras")
    save_model(network().inference, tmp_path / "b.keras")
    assert (tmp_path / "a.keras").read_bytes() == (tmp_path / "b.keras").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.keras", "b.keras"]


def test_stock_keras_loads_what_was_saved(built: Network, tmp_path: Path) -> None:
    save_model(built.inference, tmp_path / "a.keras")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    loaded = keras.models.load_model(tmp_path / "a.keras", compile=False)
    expected = built.inference.predict_on_batch(images)
    np.testing.assert_array_equal(loaded.predict_on_batch(images), expected)


def test_no_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.keras"):
        load_model(tmp_path / "absent.keras")
    (tmp_path / "broken.keras").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"broken\.keras"):
        load_model(tmp_path / "broken.keras")


def trainable(built: Network) -> list[str]:
    return [layer.name for layer in built.base.layers if layer.trainable and layer.weights]


def test_fine_tuning_starts_at_the_layer_named() -> None:
    built = network()
    set_trainable(built.base, "conv_pw_13")
    assert trainable(built) == ["conv_pw_13", "conv_pw_13_bn"]
    set_trainable(built.base, "all")
    assert len(trainable(built)) == 54
    set_trainable(built.base, "none")
    assert not built.training.trainable_weights[2:]


def test_an_unknown_layer_is_a_clear_error(built: Network) -> None:
    with pytest.raises(UserError, match="conv_pw_13"):
        set_trainable(built.base, "conv99")


@pytest.mark.parametrize(("frozen", "changes"), [(True, False), (False, True)])
def test_frozen_batch_norm_keeps_its_statistics(frozen: bool, changes: bool) -> None:
    built = network()
    set_trainable(built.base, "all", batch_norm=not frozen)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    before = built.base.get_layer("conv1_bn").moving_mean.numpy().copy()
    built.training.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    built.training.fit(images, np.zeros((8, 1)), verbose=0)
    after = built.base.get_layer("conv1_bn").moving_mean.numpy()
    assert (before != after).any() == changes


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


def test_imagenet_weights_from_a_path(shared: Path) -> None:
    path = shared / "weights" / "mobilenet_1_0_224_tf_no_top.h5"
    loaded = network(weights=str(path), alpha=1.0, image_size=64)
    assert float(np.std(loaded.base.get_layer("conv1").kernel.numpy())) > 0.1
