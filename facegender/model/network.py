"""The model: MobileNet v1 with its input scaling and a head for two classes."""

import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from facegender.errors import UserError
from facegender.files import file_sha256
from facegender.model.batch_norm_folding import fold_batch_norm, unfold_batch_norm

_IMAGENET_TROUBLE = (
    "The ImageNet weights of MobileNet could not be downloaded ({reason}). They come from Keras' "
    "own server, once, and are then kept in ~/.keras/models. Without network, fetch the file on "
    "another machine and pass its path: `-S model.weights=PATH` (a MobileNet v1 file without top, "
    "in Keras' layout, of the same alpha). To train from scratch: `-S model.weights=none`."
)


class Network:
    """MobileNet v1, its input scaling and a head for two classes.

    With `batch_norm="frozen"` the layers that are trained are not MobileNet's own but their
    equals with BatchNorm folded into the convolutions (`batch_norm_folding`), which train in about
    0.6 of the time; `inference` writes them back into the plain MobileNet.

    Attributes:
        image_size: pixels a side of what `inference` takes.
        base: the plain MobileNet, float32 (n, size, size, 3) in [-1, 1] to (n, features).
        trunk: what is trained in its stead: `base` itself, or its folded equal, which takes images
            of any size.
        head: (n, features) to the logit (n, 1).
    """

    def __init__(
        self,
        base: keras.Model,
        *,
        image_size: int,
        batch_norm: str,
        dropout: float,
        test_time_flip: bool,
        seed: int,
    ) -> None:
        """Put a new head on `base`; see `build_network`."""
        self.image_size = image_size
        self.base = base
        self.trunk = fold_batch_norm(base) if batch_norm == "frozen" else base
        self._test_time_flip = test_time_flip
        drop = keras.layers.Dropout(dropout, seed=seed, name="dropout")
        self._dense = keras.layers.Dense(1, name="logit")
        features = keras.Input(base.output_shape[1:], name="features")
        self.head = keras.Model(features, self._dense(drop(features)), name="head")

    def training(self, augmentation: Sequence[keras.layers.Layer]) -> keras.Model:
        """Return a model of the trained layers: uint8 RGB (n, size, size, 3) to the logit (n, 1).

        Args:
            augmentation: layers that take and give float32 images in [-1, 1].
        """
        image = keras.Input(self.trunk.input_shape[1:], dtype="uint8", name="image")
        pixels = _scale()(image)
        for layer in augmentation:
            pixels = layer(pixels)
        return keras.Model(image, self.head(self.trunk(pixels)), name="facegender_training")

    def features(self) -> keras.Model:
        """Return a model of the trunk alone: uint8 RGB (n, size, size, 3) to (n, features)."""
        image = keras.Input(self.trunk.input_shape[1:], dtype="uint8", name="image")
        return keras.Model(image, self.trunk(_scale()(image)), name="facegender_features")

    def logits(self) -> keras.Model:
        """Return a model of what is judged: uint8 RGB (n, size, size, 3) to the logit (n, 1)."""
        image = keras.Input(self.trunk.input_shape[1:], dtype="uint8", name="image")
        return keras.Model(image, self._logit(image, self.trunk), name="facegender_logits")

    def inference(self, temperature: float = 1.0) -> keras.Model:
        """Return the model to save: uint8 RGB (n, size, size, 3) to P(male), float32 (n, 1).

        A plain `keras.applications.MobileNet` with stock layers around it. Scaling from [0, 255] to
        [-1, 1] is one of them, so that what is deployed takes plain uint8 RGB.

        Args:
            temperature: divides the logit (`facegender.training.calibration`).
        """
        if self.trunk is not self.base:
            unfold_batch_norm(self.trunk, self.base)
        image = keras.Input((self.image_size, self.image_size, 3), dtype="uint8", name="image")
        logit = self._logit(image, self.base)
        cooled = keras.layers.Rescaling(1 / temperature, name="temperature")(logit)
        probability = keras.layers.Activation("sigmoid", name="probability_male")(cooled)
        return keras.Model(image, probability, name="facegender")

    def set_replicated(self, replicated: bool) -> None:
        """Have BatchNorm take its statistics over all devices' shares of a batch, or not."""
        for layer in self.trunk.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = replicated

    def set_float32(self) -> None:
        """Compute in float32 from now on, after training in mixed precision."""
        folded = self.trunk is not self.base
        self.base = _in_float32(self.base)
        self.trunk = _in_float32(self.trunk) if folded else self.base

    def _logit(self, image: keras.KerasTensor, trunk: keras.Model) -> keras.KerasTensor:
        if not self._test_time_flip:
            return self._dense(trunk(_scale()(image)))
        # The mean over each image and its mirror image, which go through as one batch.
        both = keras.ops.concatenate([image, keras.ops.flip(image, axis=2)], axis=0)
        logits = self._dense(trunk(_scale()(both)))
        return keras.ops.mean(keras.ops.reshape(logits, (2, -1, 1)), axis=0)


def _in_float32(model: keras.Model) -> keras.Model:
    # Another model, as a model's graph is saved with the dtypes that it was built with.
    float32 = keras.config.dtype_policy()
    copy = keras.models.clone_model(
        model,
        input_tensors=keras.Input(model.input_shape[1:], name=model.layers[0].name),
        clone_function=lambda layer: layer.from_config(layer.get_config() | {"dtype": float32}),
    )
    copy.set_weights(model.get_weights())
    return copy


def _scale() -> keras.layers.Layer:
    return keras.layers.Rescaling(1 / 127.5, offset=-1, name="scale")


def build_network(
    *,
    image_size: int,
    alpha: float,
    weights: str,
    dropout: float,
    batch_norm: str,
    batch_norm_momentum: float,
    seed: int,
    weights_sha256: str | None = None,
    test_time_flip: bool = False,
    mixed_precision: bool = False,
) -> Network:
    """Build MobileNet v1 for `image_size` with one output.

    Args:
        image_size: pixels a side.
        alpha: MobileNet's width multiplier.
        weights: `imagenet`, `none`, or the path of a weights file without top.
        dropout: rate before the last layer.
        batch_norm: `train`, or `frozen` to keep the statistics of the weights.
        batch_norm_momentum: of the running statistics. Keras' 0.99 needs thousands of steps to
            forget where it started; short training from scratch needs less.
        seed: source of chance of the dropout.
        weights_sha256: digest that a weights file must have, or None.
        test_time_flip: the logit is the mean of the image's and its mirror image's: more often
            right, at twice the work of a prediction. Training is as without.
        mixed_precision: compute in bfloat16 but for the head, with weights in float32, until
            `set_float32`.

    Raises:
        UserError: the weights cannot be downloaded, read, or do not fit.
    """
    usual = keras.config.dtype_policy()  # float32
    if mixed_precision:
        keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        base = _mobilenet((image_size, image_size, 3), alpha, weights, weights_sha256)
    finally:
        keras.config.set_dtype_policy(usual)
    for layer in base.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = batch_norm_momentum
    return Network(
        base,
        image_size=image_size,
        batch_norm=batch_norm,
        dropout=dropout,
        test_time_flip=test_time_flip,
        seed=seed,
    )


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
    # Keras wraps whatever goes wrong in a download in a bare Exception, and a file that is no
    # weights file makes it raise what it likes.
    except Exception as error:
        if weights == "imagenet" and not isinstance(error, ValueError | OSError):
            reason = str(error).splitlines()[0]
            raise UserError(_IMAGENET_TROUBLE.format(reason=reason)) from error
        raise UserError(
            f"The weights {weights!r} do not fit MobileNet v1 with alpha {alpha}: {error} "
            "Keras has ImageNet weights for alpha 0.25, 0.5, 0.75 and 1.0."
        ) from error


def set_trainable(trunk: keras.Model, fine_tune_from: str) -> None:
    """Make the layers of `trunk` from `fine_tune_from` on trainable, and freeze those before it.

    Args:
        trunk: MobileNet, or its folded equal.
        fine_tune_from: `all`, `none`, or the name of a layer, such as `conv_pw_6`.

    Raises:
        UserError: no layer has that name.
    """
    names = [layer.name for layer in trunk.layers]
    starts = {"all": 0, "none": len(names)} | {name: place for place, name in enumerate(names)}
    if fine_tune_from not in starts:
        raise UserError(
            f"MobileNet has no layer {fine_tune_from!r}: train.fine_tune_from is `all` or one of "
            f"{', '.join(name for name in names if name.startswith('conv'))}."
        )
    trunk.trainable = True
    # Each layer by itself: Keras does not hand a flag on to layers when the model has it already.
    for place, layer in enumerate(trunk.layers):
        layer.trainable = place >= starts[fine_tune_from]


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
        UserError: the file is missing, is no `.keras` file, or asks for what a model of stock
            layers needs not: code, other classes, other files.
    """
    remedy = "`dvc repro` trains it, `dvc pull` fetches it from a remote."
    if path.suffix != ".keras":
        # Keras goes by the ending, and has no safe mode for the older formats.
        raise UserError(f"The model {path.name} is no .keras file. {remedy}")
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    # Files that nobody vouches for make Keras raise what it likes.
    except Exception as error:
        # Its advice on how to run the code after all is not passed on.
        reason = str(error).partition(" If you trust")[0].rstrip(".")
        raise UserError(f"Cannot load the model {path.name}: {reason}. {remedy}") from error


def predict_arrays(model: keras.Model, batches: Iterable[np.ndarray]) -> np.ndarray:
    """Return P(male), or the logit if the model ends in it, for batches of decoded images.

    Args:
        model: a saved model, or one in training.
        batches: uint8 arrays of shape (n, size, size, 3).

    Returns:
        float64 of shape (total,).
    """
    # A compiled graph, without the set-up of `predict`, which is made anew for every call.
    outputs = [np.asarray(model.predict_on_batch(batch))[:, 0] for batch in batches]
    return np.concatenate(outputs).astype(np.float64) if outputs else np.empty(0)
