"""The small network of the tests. In a module of its own, for it imports TensorFlow."""

from typing import Any

from facegender.model import Network, build_network
from facegender.training import make_deterministic


def small_network(**changes: Any) -> Network:
    """Build an untrained network for images of 32 pixels, the same for the same arguments."""
    settings = {
        "image_size": 32,
        "alpha": 0.25,
        "weights": "none",
        "dropout": 0.0,
        "seed": 1,
        "batch_norm": "train",
        "batch_norm_momentum": 0.9,
    } | changes
    make_deterministic(settings["seed"])
    return build_network(**settings)
