"""Fingerprints of image files: what each process of the data checks computes.

Kept apart from `checks` because every worker imports this module, and must not import pandas.
"""

from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image

from facegender.data.images import InvalidImage, measure_image, verdict

THUMBNAIL_SIZE = 32  # pixels a side

_HASH_SIDES = (16, 8)
_DECODED_SIZE = 64  # pixels a side: what the hashes are computed from


@dataclass(frozen=True)
class Fingerprint:
    """What is known of a file that holds an image.

    Attributes:
        width: pixels, perhaps before it is turned upright.
        height: likewise.
        contrast: the widest range of a colour channel, 0 to 255, of the image made small.
        hashes: its perceptual hashes, of 256 bits and of 64: uint64 of shape (5,).
        thumbnail: uint8 of shape (32, 32, 3).
    """

    width: int
    height: int
    contrast: int
    hashes: np.ndarray
    thumbnail: np.ndarray


def take_fingerprints(paths: list[Path]) -> list[Fingerprint | str]:
    """Return for each file its fingerprint, or the reason why it cannot be decoded.

    The hashes are imagehash's pHash: which of the lowest frequencies of the picture in grey are
    above their median. Of 256 bits it tells more, of 64 it is steadier for a blurred picture.
    """
    # As in `rows`: new pages for every image would take a fifth of the time.
    Image.core.set_blocks_max(4)
    return [_take(path) for path in paths]


def _take(path: Path) -> Fingerprint | str:
    try:
        pixels, width, height = measure_image(path, _DECODED_SIZE)
    except InvalidImage as error:
        return verdict(error, path)
    image = Image.fromarray(pixels)
    bits = [imagehash.phash(image, hash_size=side).hash.ravel() for side in _HASH_SIDES]
    thumbnail = image.reduce(_DECODED_SIZE // THUMBNAIL_SIZE)
    return Fingerprint(
        width,
        height,
        int(np.ptp(pixels, axis=(0, 1)).max()),
        np.packbits(np.concatenate(bits)).view(np.uint64),
        np.asarray(thumbnail),
    )
