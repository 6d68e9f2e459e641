"""Near duplicates: one picture in two files, even if one of them was changed.

Finds copies that were encoded again, resized, brightened, mirrored, made grey or paler, turned by 5
degrees or cropped by 10 %. `similar_pictures` proposes pairs, and `alignment` decides.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from facegender.data import alignment, similar_pictures
from facegender.data.fingerprint_store import Thumbnails

_PAIRS = 32  # pairs aligned at a time; their arrays fit into a core's cache


class NearDuplicates(NamedTuple):
    """Indices of pictures that are linked by near duplicates.

    Attributes:
        groups: members of each group of two or more, in order.
        crowded: pictures that resemble more than `similar_pictures.MOST` others, in order. Only the
            likeliest of these were compared, none of which is a copy; another may be.
    """

    groups: list[list[int]]
    crowded: list[int]


def find_near_duplicates(thumbnails: np.ndarray | Thumbnails) -> NearDuplicates:
    """Find the pictures that are linked by near duplicates.

    Args:
        thumbnails: uint8 of shape (n, 32, 32, 3); may be mapped from a file.
    """
    n = len(thumbnails)
    groups = np.arange(n)
    if n < 2:
        return NearDuplicates([], [])
    crowded: set[int] = set()
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
            crowded.difference_update(found.searched.tolist())
            crowded.update(found.crowded.tolist())
            bar.update(found.upto - seen)
            seen = found.upto
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    parts = np.split(order, starts[1:])
    return NearDuplicates([part.tolist() for part in parts if len(part) > 1], sorted(crowded))


def _compare(
    thumbnails: np.ndarray | Thumbnails, found: similar_pictures.Candidates, piece: slice
) -> np.ndarray:
    return alignment.same_picture(
        thumbnails[found.moved[piece]],
        thumbnails[found.fixed[piece]],
        found.matrix[piece],
        found.shift[piece],
    )
