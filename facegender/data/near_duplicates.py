"""Near duplicates: the same picture in two files, whatever was done to one of them.

Found are copies that were encoded again, resized, brightened, mirrored, made grey or paler, turned
by 5 degrees or cropped by 10 %. `similar_pictures` proposes pairs, and `alignment` decides.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from facegender.data import alignment, similar_pictures
from facegender.data.fingerprint_store import Thumbnails

_PAIRS = 32  # aligned at a time; their arrays fit into a core's cache


def find_near_duplicates(thumbnails: np.ndarray | Thumbnails) -> list[list[int]]:
    """Return the groups of pictures that are linked by near duplicates.

    Args:
        thumbnails: uint8 of shape (n, 32, 32, 3); may be mapped from a file.

    Returns:
        Positions of the members of each group of two or more, in order.
    """
    n = len(thumbnails)
    groups = np.arange(n)
    if n < 2:
        return []
    seen = 0
    with (
        threadpool_limits(1),  # each thread of the pool multiplies its own matrices
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=n, desc="compare", unit="image", mininterval=1) as bar,
    ):
        for found in similar_pictures.find_candidates(thumbnails, groups, pool.map):
            pieces = [slice(at, at + _PAIRS) for at in range(0, len(found.moved), _PAIRS)]
            compare = functools.partial(_compare, thumbnails, found)
            verdicts = list(pool.map(compare, pieces))
            for piece, same in zip(pieces, verdicts, strict=True):
                for one, other in zip(
                    found.moved[piece][same], found.fixed[piece][same], strict=True
                ):
                    least, most = sorted((groups[one], groups[other]))
                    if least != most:
                        groups[groups == most] = least
            bar.update(found.upto - seen)
            seen = found.upto
        bar.update(n - seen)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    return [part.tolist() for part in np.split(order, starts[1:]) if len(part) > 1]


def _compare(
    thumbnails: np.ndarray | Thumbnails, found: similar_pictures.Candidates, piece: slice
) -> np.ndarray:
    return alignment.same_picture(
        thumbnails[found.moved[piece]],
        thumbnails[found.fixed[piece]],
        found.matrix[piece],
        found.shift[piece],
    )
