"""Fingerprints of image files, as each process of the data checks computes them.

Kept separate from `checks` because every worker imports this module, and must not import pandas.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from facegender.data.decode_rows import check_file
from facegender.data.images import InvalidImage, measure_image, verdict

THUMBNAIL_SIZE = 32  # pixels a side

_DECODED_SIZE = 64  # pixels a side, averaged into the thumbnail


def take_fingerprints(
    paths: Sequence[Path], digests: Sequence[str] | None = None, *, first_row: int = 0
) -> tuple[int, np.ndarray, np.ndarray, dict[int, str]]:
    """Decode images at a small size.

    Args:
        digests: SHA-256 of each file, to check on another machine.
        first_row: row of the first of the images.

    Returns:
        `first_row`; int32 (n, 3): width and height in pixels, perhaps before the image is turned
        upright, and contrast, the widest range of a colour channel (0 to 255); thumbnails, uint8
        (n, 32, 32, 3); and by row the reasons why some images cannot be decoded. Their other values
        are zero.

    Raises:
        UserError: a file cannot be read, or differs from its digest.
    """
    # As in `decode_rows`: new pages for every image would take a fifth of the time.
    Image.core.set_blocks_max(4)
    measures = np.zeros((len(paths), 3), np.int32)
    thumbnails = np.zeros((len(paths), THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3), np.uint8)
    reasons = {}
    for index, path in enumerate(paths):
        if digests:
            check_file(path, digests[index])
        try:
            pixels, width, height = measure_image(path, _DECODED_SIZE)
        except InvalidImage as error:
            reasons[first_row + index] = verdict(error, path)
            continue
        measures[index] = width, height, np.ptp(pixels, axis=(0, 1)).max()
        small = Image.fromarray(pixels).reduce(_DECODED_SIZE // THUMBNAIL_SIZE)
        thumbnails[index] = np.asarray(small)
    return first_row, measures, thumbnails, reasons
