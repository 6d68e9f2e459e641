"""MobileNet v1 without top, with ImageNet weights, those of a file, or random ones."""

from pathlib import Path

import keras

from facegender.errors import UserError, reason_of
from facegender.files import file_sha256

_IMAGENET_TROUBLE = (
    "The ImageNet weights of MobileNet could not be downloaded or read ({reason}). Keras' server "
    "sends them once, and ~/.keras/facegender/models keeps them: if a download was killed, delete "
    "the file there. Without network, fetch the file on another machine (MobileNet v1 without top, "
    "in Keras' layout, of the same alpha) and pass its path: `-S model.weights=PATH`, or "
    "`--weights PATH` to audit-labels. To train from scratch: `-S model.weights=none`."
)


def mobilenet(
    shape: tuple[int, int, int], alpha: float, weights: str, weights_sha256: str | None
) -> keras.Model:
    """Return MobileNet v1 without top; see `build_network` for the arguments and errors."""
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
    # Keras raises a bare Exception if a download fails, and anything for a damaged file.
    except Exception as error:
        reason = reason_of(error).rstrip(".")
        if weights == "imagenet" and not isinstance(error, ValueError):
            raise UserError(_IMAGENET_TROUBLE.format(reason=reason)) from error
        raise UserError(
            f"The weights {weights!r} do not fit MobileNet v1 with alpha {alpha}: {reason}. "
            "Keras has ImageNet weights for alpha 0.25, 0.5, 0.75 and 1.0."
        ) from error
