"""The model: MobileNet v1 with its input scaling and a head for two classes."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from facegender.errors import UserError
from facegender.files import file_sha256

_IMAGENET_TROUBLE = (
    "The ImageNet weights of MobileNet could not be downloaded ({reason}). They come from Keras' "
    "own server, once, and are then kept in ~/.keras/models. Without network, fetch the file on "
    "another machine and pass its path: `-S model.weights=PATH` (a MobileNet v1 file without top, "
    "in Keras' layout, of the same alpha). To train from scratch: `-S model.weights=none`."
)


@dataclass(frozen=True)
class Network:
    """The layers of a model, assembled twice.

    Attributes:
        inference: what is saved: uint8 RGB (n, size, size, 3) to P(male), float32 (n, 1).
        training: the same layers behind the augmentation, ending in the logit.
        base: MobileNet, a layer of both.
    """

    inference: keras.Model
    training: keras.Model
    base: keras.Model


def build_network(
    *,
    image_size: int,
    alpha: float,
    weights: str,
    dropout: float,
    batch_norm_momentum: float,
    augmentation: list[keras.layers.Layer],
    seed: int,
    weights_sha256: str | None = None,
) -> Network:
    """Build MobileNet v1 for `image_size` with one sigmoid output.

    Scaling from [0, 255] to [-1, 1] is a layer of the saved model, so that what is deployed takes
    plain uint8 RGB. Augmentation is part of the training model only.

    Args:
        image_size: pixels a side.
        alpha: MobileNet's width multiplier.
        weights: `imagenet`, `none`, or the path of a weights file without top.
        dropout: rate before the last layer.
        batch_norm_momentum: of the running statistics. Keras' 0.99 needs thousands of steps to
            forget where it started; short training from scratch needs less.
        augmentation: layers that take and give float32 images in [-1, 1].
        seed: source of chance of the dropout.
        weights_sha256: digest that a weights file must have, or None.

    Raises:
        UserError: the weights cannot be downloaded, read, or do not fit.
    """
    shape = (image_size, image_size, 3)
    base = _mobilenet(shape, alpha, weights, weights_sha256)
    for layer in base.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = batch_norm_momentum
    scale = keras.layers.Rescaling(1 / 127.5, offset=-1, name="scale")
    drop = keras.layers.Dropout(dropout, seed=seed, name="dropout")
    dense = keras.layers.Dense(1, name="logit")
    sigmoid = keras.layers.Activation("sigmoid", name="probability_male")

    image = keras.Input(shape, dtype="uint8", name="image")
    inference = keras.Model(image, sigmoid(dense(drop(base(scale(image))))), name="facegender")
    augmented = scale(image)
    for layer in augmentation:
        augmented = layer(augmented)
    training = keras.Model(image, dense(drop(base(augmented))), name="facegender_training")
    return Network(inference, training, base)


def _mobilenet(
    shape: tuple[int, int, int], alpha: float, weights: str, weights_sha256: str | None
) -> keras.Model:
    source: str | None = weights
    if weights == "none":
        source = None
    elif weights != "imagenet":
        path = Path(weights)
        if not path.is_file():
            raise UserError(
                f"There is no weights file {weights!r}: model.weights is `imagenet`, `none`, or "
                "the path of a MobileNet v1 weights file without top, in Keras' layout."
            )
        if weights_sha256 is not None and file_sha256(path) != weights_sha256:
            raise UserError(
                f"The weights file {path.name} is not the one that model.weights_sha256 pins: its "
                f"SHA-256 is {file_sha256(path)}. Fetch the right file, or change the pin."
            )
    try:
        return keras.applications.MobileNet(
            input_shape=shape, alpha=alpha, include_top=False, weights=source, pooling="avg"
        )
    except (ValueError, OSError) as error:
        raise UserError(
            f"The weights {weights!r} do not fit MobileNet v1 with alpha {alpha}: {error} "
            "Keras has ImageNet weights for alpha 0.25, 0.5, 0.75 and 1.0."
        ) from error
    except Exception as error:
        # Keras wraps whatever goes wrong in a download in a bare Exception.
        if weights != "imagenet":
            raise
        raise UserError(_IMAGENET_TROUBLE.format(reason=str(error).splitlines()[0])) from error


def set_trainable(base: keras.Model, fine_tune_from: str, *, batch_norm: bool = True) -> None:
    """Make the layers of `base` from `fine_tune_from` on trainable, and freeze those before it.

    A frozen BatchNorm runs in inference mode, as Keras' transfer-learning guide advises for
    pretrained weights. That guide's own way, calling the base with `training=False`, does not
    hold inside `fit` of a functional model in Keras 3.15: the statistics are changed all the same.

    Args:
        base: MobileNet.
        fine_tune_from: `all`, `none`, or the name of a layer, such as `conv_pw_6`.
        batch_norm: whether BatchNorm layers are among those to train.

    Raises:
        UserError: no layer has that name.
    """
    names = [layer.name for layer in base.layers]
    starts = {"all": 0, "none": len(names)} | {name: place for place, name in enumerate(names)}
    if fine_tune_from not in starts:
        raise UserError(
            f"MobileNet has no layer {fine_tune_from!r}: train.fine_tune_from is `all` or one of "
            f"{', '.join(name for name in names if name.startswith('conv'))}."
        )
    base.trainable = True
    # Each layer by itself: Keras does not hand a flag on to layers when the model has it already.
    for place, layer in enumerate(base.layers):
        is_batch_norm = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = place >= starts[fine_tune_from] and (batch_norm or not is_batch_norm)


def save_model(model: keras.Model, path: Path) -> None:
    """Save a model as a `.keras` file whose bytes depend on the model alone.

    Keras writes the time of saving and the addresses of shared objects into the archive; here
    they become constants and running numbers, so that the same weights make the same file.
    """
    aside = path.with_name(f".{path.stem}.tmp.keras")
    model.save(aside)
    with zipfile.ZipFile(aside) as saved, zipfile.ZipFile(path, "w") as fixed:
        for name in sorted(saved.namelist()):
            content = saved.read(name)
            if name == "metadata.json":
                metadata = json.loads(content) | {"date_saved": "1980-01-01@00:00:00"}
                content = json.dumps(metadata).encode()
            elif name == "config.json":
                content = json.dumps(_renumber(json.loads(content), {})).encode()
            # ZipInfo's own date is a constant.
            fixed.writestr(zipfile.ZipInfo(name), content)
    aside.unlink()


def _renumber(item: Any, numbers: dict[int, int]) -> Any:
    """Return a copy of a configuration whose shared objects are numbered as they come."""
    if isinstance(item, list):
        return [_renumber(child, numbers) for child in item]
    if not isinstance(item, dict):
        return item
    return {
        key: numbers.setdefault(child, len(numbers))
        if key == "shared_object_id"
        else _renumber(child, numbers)
        for key, child in item.items()
    }


def load_model(path: Path) -> keras.Model:
    """Load a saved model with stock Keras; code inside the file is never run.

    Raises:
        UserError: the file is missing or is no Keras model.
    """
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"Cannot load the model {path.name}: {error}. `dvc repro` trains it, `dvc pull` "
            "fetches it from a remote."
        ) from error
