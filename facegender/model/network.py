"""The model: MobileNet v1 with its input scaling and a head for two classes."""

from collections.abc import Sequence

import keras
import tensorflow as tf

from facegender.errors import UserError
from facegender.model.backbone import mobilenet
from facegender.model.batch_norm_folding import fold_batch_norm, unfold_batch_norm


class Network:
    """MobileNet v1, its input scaling and a head for two classes.

    With `batch_norm="frozen"`, training uses a copy of MobileNet whose BatchNorm is folded into the
    convolutions (`batch_norm_folding`), which takes about 0.6 of the time. `inference` writes the
    weights back into the plain MobileNet.

    Attributes:
        image_size: pixels a side of what `inference` takes.
        base: the plain MobileNet, float32 (n, size, size, 3) in [-1, 1] to (n, features).
        trained_base: the network that is trained: `base`, or its folded copy, which takes images
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
        self.trained_base = fold_batch_norm(base) if batch_norm == "frozen" else base
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
        image = keras.Input(self.trained_base.input_shape[1:], dtype="uint8", name="image")
        pixels = _scale()(image)
        for layer in augmentation:
            pixels = layer(pixels)
        return keras.Model(image, self.head(self.trained_base(pixels)), name="facegender_training")

    def features(self) -> keras.Model:
        """Return the model of `trained_base`: uint8 RGB (n, size, size, 3) to (n, features)."""
        image = keras.Input(self.trained_base.input_shape[1:], dtype="uint8", name="image")
        return keras.Model(image, self.trained_base(_scale()(image)), name="facegender_features")

    def logits(self) -> keras.Model:
        """Return the model as `inference` judges: uint8 RGB (n, size, size, 3) to logit (n, 1)."""
        image = keras.Input(self.trained_base.input_shape[1:], dtype="uint8", name="image")
        return keras.Model(image, self._logit(image, self.trained_base), name="facegender_logits")

    def inference(self, slope: float = 1.0, intercept: float = 0.0) -> keras.Model:
        """Return the model to save: uint8 RGB (n, size, size, 3) to P(male), float32 (n, 1).

        A plain `keras.applications.MobileNet` with stock layers around it. One of them scales
        [0, 255] to [-1, 1].

        Args:
            slope: factor of the logit (`facegender.training.calibration`).
            intercept: added to the logit after that.
        """
        if self.trained_base is not self.base:
            unfold_batch_norm(self.trained_base, self.base)
        image = keras.Input((self.image_size, self.image_size, 3), dtype="uint8", name="image")
        logit = self._logit(image, self.base)
        calibrated = keras.layers.Rescaling(slope, intercept, name="calibration")(logit)
        probability = keras.layers.Activation("sigmoid", name="probability_male")(calibrated)
        return keras.Model(image, probability, name="facegender")

    def set_replicated(self, replicated: bool) -> None:
        """Set whether BatchNorm takes its statistics over all devices' shares of a batch."""
        for layer in self.trained_base.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = replicated

    def set_float32(self) -> None:
        """Compute in float32 from now on, after training in mixed precision."""
        folded = self.trained_base is not self.base
        self.base = _in_float32(self.base)
        self.trained_base = _in_float32(self.trained_base) if folded else self.base

    def _logit(self, image: keras.KerasTensor, trained_base: keras.Model) -> keras.KerasTensor:
        if not self._test_time_flip:
            return self._dense(trained_base(_scale()(image)))
        # Images and mirror images pass as one batch.
        both = keras.ops.concatenate([image, keras.ops.flip(image, axis=2)], axis=0)
        logits = self._dense(trained_base(_scale()(both)))
        return keras.ops.mean(keras.ops.reshape(logits, (2, -1, 1)), axis=0)


def _in_float32(model: keras.Model) -> keras.Model:
    # A new model, because a model's graph is saved with the dtypes it was built with.
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
        batch_norm_momentum: momentum of the running statistics. Keras' 0.99 needs thousands of
            steps to forget where it started; short training from scratch needs less.
        seed: seed of the dropout.
        weights_sha256: digest that a weights file must have, or None.
        test_time_flip: the logit is the mean of the image's and its mirror image's: more often
            right, at twice the work. Training does not change.
        mixed_precision: compute in bfloat16, except for the head, with weights in float32, until
            `set_float32`.

    Raises:
        UserError: the weights cannot be downloaded or read, or do not fit; or this machine cannot
            compute in bfloat16.
    """
    usual = keras.config.dtype_policy()  # float32
    if mixed_precision:
        _require_bfloat16()
        keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        base = mobilenet((image_size, image_size, 3), alpha, weights, weights_sha256)
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


def _require_bfloat16() -> None:
    # oneDNN lacks bfloat16 convolutions for some instruction sets, and fails at the first one.
    image, kernel = (keras.ops.zeros(shape, "bfloat16") for shape in ((1, 8, 8, 3), (3, 3, 3, 4)))
    try:
        keras.ops.conv(image, kernel, padding="same")
    except tf.errors.OpError as error:
        raise UserError(
            "This machine cannot compute convolutions in bfloat16: set train.mixed_precision to "
            "false, or train on a GPU or on a CPU with AVX-512."
        ) from error


def set_trainable(trained_base: keras.Model, fine_tune_from: str) -> None:
    """Make the layers from `fine_tune_from` on trainable, and freeze those before it.

    Args:
        trained_base: MobileNet, or its folded copy.
        fine_tune_from: `all`, or the name of a layer, such as `conv_pw_6`.

    Raises:
        UserError: no layer has that name.
    """
    names = [layer.name for layer in trained_base.layers]
    if fine_tune_from not in {"all", *names}:
        raise UserError(
            f"MobileNet has no layer {fine_tune_from!r}: train.fine_tune_from is `all` or one of "
            f"{', '.join(name for name in names if name.startswith('conv'))}."
        )
    first = 0 if fine_tune_from == "all" else names.index(fine_tune_from)
    trained_base.trainable = True
    # One by one: Keras does not pass the flag on to layers if the model has that value already.
    for index, layer in enumerate(trained_base.layers):
        layer.trainable = index >= first
