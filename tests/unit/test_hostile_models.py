"""Model files that nobody vouches for, each loaded as the project loads its own."""

import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from facegender.errors import UserError
from facegender.faces.settings import FaceCrop
from facegender.inference.export import convert
from facegender.inference.loading import load_predictors
from facegender.inference.model_crop import write_crop
from facegender.model.saved_model import load_model
from tests.conftest import Exported
from tests.networks import small_network


def changed(source: Path, target: Path, **members: bytes | None) -> Path:
    """Copy a `.keras` file with members replaced, added or (None) left out; `__` is a dot."""
    changes = {name.replace("__", "."): content for name, content in members.items()}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if name not in changes:
                new.writestr(name, old.read(name))
        for name, content in changes.items():
            if content is not None:
                new.writestr(name, content)
    return target


def with_layer(exported: Exported, target: Path, layer: dict) -> Path:
    """Copy the model with the class and the configuration of its last layer replaced."""
    with zipfile.ZipFile(exported.keras) as archive:
        config = json.loads(archive.read("config.json"))
    last = config["config"]["layers"][-1]
    settings = layer.pop("config")
    last |= {"registered_name": None} | layer
    last["config"] = {"name": last["name"], "trainable": True} | settings
    return changed(exported.keras, target, config__json=json.dumps(config).encode())


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A model that makes the file `mark` when its code is run."""
    mark = str(tmp_path / "mark")
    # Where it is loaded there is no Path.
    touch = keras.layers.Lambda(lambda x: open(mark, "w").close() or x)  # noqa: PTH123
    images = keras.Input((8, 8, 3))
    keras.Model(images, touch(images)).save(tmp_path / "hostile.keras")
    Path(mark).unlink()
    return tmp_path / "hostile.keras"


def test_a_lambda_is_not_run(with_code: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Lambda") as caught:
        load_model(with_code)
    assert not (tmp_path / "mark").exists()
    assert "safe_mode" not in str(caught.value)  # no advice to run it after all
    # It would have been: the file is what it is meant to be.
    keras.saving.load_model(with_code, safe_mode=False)
    assert (tmp_path / "mark").exists()


def test_pickled_weights_are_not_read(exported: Exported, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, _layer_checkpoint_dependencies=np.array([Touch(tmp_path / "mark")]))
    path = changed(
        exported.keras,
        tmp_path / "hostile.keras",
        model__weights__h5=None,
        model__weights__npz=buffer.getvalue(),
    )
    with pytest.raises(UserError, match=r"hostile\.keras"):
        load_model(path)
    assert not (tmp_path / "mark").exists()
    np.load(io.BytesIO(buffer.getvalue()), allow_pickle=True)["_layer_checkpoint_dependencies"]
    assert (tmp_path / "mark").exists()


LAYERS: dict[str, Callable[[Path], dict]] = {
    "a function of the system": lambda folder: {
        "module": "os",
        "class_name": "system",
        "config": {"command": f"touch {folder}/mark"},
    },
    "a module of somebody's": lambda folder: {
        "module": "evil",
        "class_name": "Layer",
        "registered_name": "evil>Layer",
        "config": {},
    },
    "a function of keras that writes files": lambda folder: {
        "module": "keras.utils",
        "class_name": "get_file",
        "config": {"fname": f"{folder}/mark", "origin": "http://127.0.0.1:9/"},
    },
    "a TensorFlow program": lambda folder: {
        "module": "keras.layers",
        "class_name": "TFSMLayer",
        "config": {"filepath": str(folder)},
    },
    "a layer that reads files": lambda folder: {
        "module": "keras.layers",
        "class_name": "StringLookup",
        "config": {"vocabulary": "/etc/passwd"},
    },
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_is_none_is_refused(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = with_layer(exported, tmp_path / "hostile.keras", LAYERS[name](tmp_path))
    with pytest.raises(UserError, match=r"Cannot load the model hostile\.keras") as caught:
        load_model(path)
    assert not (tmp_path / "mark").exists()
    assert "\n" not in str(caught.value)


def test_the_unchanged_model_loads(exported: Exported, tmp_path: Path) -> None:
    # Else the tests above would prove nothing.
    layer = {"module": "keras.layers", "class_name": "Activation", "config": {"activation": "relu"}}
    assert load_model(with_layer(exported, tmp_path / "plain.keras", layer)).layers


FILES: dict[str, Callable[[Path], object]] = {
    "absent.keras": lambda path: None,
    "empty.keras": lambda path: path.write_bytes(b""),
    "text.keras": lambda path: path.write_text("a model"),
    "weights.keras": lambda path: h5py.File(path, "w").close(),
    "archive.keras": lambda path: zipfile.ZipFile(path, "w").close(),
    "folder.keras": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_keras_file_is_refused(tmp_path: Path, name: str) -> None:
    FILES[name](tmp_path / name)
    with pytest.raises(UserError, match=rf"Cannot load the model {name}: .*dvc repro") as caught:
        load_model(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_formats_without_a_safe_mode_are_refused(tmp_path: Path) -> None:
    small_network().inference().save(tmp_path / "model.h5")
    assert keras.saving.load_model(tmp_path / "model.h5", compile=False).layers
    with pytest.raises(UserError, match=r"model\.h5 is not a \.keras file"):
        load_model(tmp_path / "model.h5")


def write_other_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["faces"] = np.arange(3)


WEIGHTS: dict[str, Callable[[Path], object]] = {
    "text.h5": lambda path: path.write_text("weights"),
    "other.h5": write_other_h5,
    "other.weights.h5": write_other_h5,
    "text.keras": lambda path: path.write_text("weights"),
    "pickle.pkl": lambda path: path.write_bytes(b"\x80\x04."),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_are_no_weights_is_refused(tmp_path: Path, name: str) -> None:
    WEIGHTS[name](tmp_path / name)
    with pytest.raises(UserError, match="do not fit MobileNet v1"):
        small_network(weights=str(tmp_path / name))


def test_a_model_with_code_lends_its_weights_at_most(with_code: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not fit"):
        small_network(weights=str(with_code))
    assert not (tmp_path / "mark").exists()


STRANGERS = {
    "two-classes": (keras.layers.Dense(2, activation="softmax"), r"gives [\[(].*2[\])]"),
    "logit": (keras.layers.Dense(1, bias_initializer="ones"), "probabilities from 0 to 1"),
    "nan": (keras.layers.Lambda(lambda x: x[:, :1] * np.nan), "gives nan to nan"),
}


@pytest.mark.parametrize("ending", [".keras", ".tflite"])
@pytest.mark.parametrize("kind", STRANGERS)
def test_a_model_of_another_project_labels_nothing(kind: str, ending: str, tmp_path: Path) -> None:
    last, reason = STRANGERS[kind]
    images = keras.Input((8, 8, 3), dtype="uint8")
    pixels = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1.0)(images))
    model = keras.Model(images, last(pixels))
    path = tmp_path / f"stranger{ending}"
    white = np.full((2, 8, 8, 3), 255, np.uint8)
    if ending == ".tflite":
        path.write_bytes(convert(model, white)[0])
    elif kind == "nan":
        pytest.skip("Keras loads no Lambda")
    else:
        model.save(path)
    with pytest.raises(UserError, match=reason):
        load_predictors(path, 1, trusted=True)[0].predict(white)


@pytest.mark.parametrize(("side", "dtype"), [(None, "uint8"), (8, "float32")])
def test_a_keras_model_of_other_images_is_named(
    tmp_path: Path, side: int | None, dtype: str
) -> None:
    images = keras.Input((side, side, 3), dtype=dtype)
    pixels = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1.0)(images))
    model = keras.Model(images, keras.layers.Dense(1, activation="sigmoid")(pixels))
    model.save(tmp_path / "any.keras")
    expected = re.escape(f"any.keras: it takes [(None, {side}, {side}, 3, '{dtype}')]")
    with pytest.raises(UserError, match=expected):
        load_predictors(tmp_path / "any.keras", 1, trusted=True)


@pytest.mark.parametrize("lost", [1, 30, 200])
def test_a_model_that_lost_its_end_does_not_judge_whole_pictures(
    exported: Exported, tmp_path: Path, lost: int
) -> None:
    whole = Path(shutil.copy(exported.float32, tmp_path))
    write_crop(whole, FaceCrop(margin=0.25, align=False, min_score=0.75, min_size=24))
    cut = tmp_path / "cut.tflite"
    cut.write_bytes(whole.read_bytes()[:-lost])
    with pytest.raises(UserError, match=r"cut\.tflite is cut off"):
        load_predictors(cut, 1, trusted=True)
