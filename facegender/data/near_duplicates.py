"""Near duplicates: the same picture, re-encoded, resized, brightened or slightly cropped.

A perceptual hash alone cannot tell: of the sample's cartoon faces some that differ in hair or
beard have hashes nearer than those of a photo and its copy cropped by 2 %. So the hash only
proposes pairs, and one picture of each pair is then laid over the other: moved, scaled and
brightened until they agree best, by the method of Lucas and Kanade ("An iterative image
registration technique with an application to stereo vision", IJCAI 1981). What differs then
decides. `python -m bench.duplicates` prints the distances that the limits below stand between.
"""

from collections.abc import Iterator

import numpy as np
from scipy.cluster.hierarchy import DisjointSet
from scipy.ndimage import gaussian_filter1d, maximum_filter, uniform_filter

from facegender.data.fingerprints import THUMBNAIL_SIZE

# Bits in which the hashes of 256 and of 64 bits may differ; of unrelated pictures half do.
MAX_FINE_DISTANCE = 56
MAX_COARSE_DISTANCE = 6
# Grey levels, of 255, by which aligned pictures may differ: root mean square, and the mean of the
# 3 x 3 pixels that differ most.
MAX_RMS = 5.5
MAX_LOCAL = 17.0

_HASH_ROWS = 8  # compared with all others at a time: few enough for the cache
_PAIRS = 256  # aligned at a time
_STEPS = 5  # of the alignment
_MAX_CROP = 0.15  # of the picture's half side
_BLUR = 1.0  # pixels
_LEAST_COMPARED = 0.05  # share of a picture that is not white
_MARGIN = 2  # pixels at the border, which a crop takes away
_CLIPPED = 250  # a level from which brightening may have cut off
_UNMOVED = np.array([1, 0, 1, 0], np.float32)  # scale and shift along x, and along y
_SIDE = np.linspace(-1, 1, THUMBNAIL_SIZE, dtype=np.float32)
_INNER = slice(_MARGIN, -_MARGIN)


def find_near_duplicates(hashes: np.ndarray, thumbnails: np.ndarray) -> list[list[int]]:
    """Return the groups of pictures that are linked by near duplicates.

    Args:
        hashes: uint64 of shape (n, 5), as in `fingerprints.Fingerprint`.
        thumbnails: uint8 of shape (n, 32, 32, 3).

    Returns:
        Positions of the members of each group of two or more, in order.
    """
    groups = DisjointSet(range(len(hashes)))
    for pairs in _similar_hashes(hashes):
        for start in range(0, len(pairs), _PAIRS):
            # Most members of a large group are linked already, and need no comparison.
            some = [pair for pair in pairs[start : start + _PAIRS] if not groups.connected(*pair)]
            if not some:
                continue
            first, second = np.transpose(some)
            for pair, same in zip(
                some, same_picture(thumbnails[first], thumbnails[second]), strict=True
            ):
                if same:
                    groups.merge(*pair)
    return sorted(sorted(members) for members in groups.subsets() if len(members) > 1)


def _similar_hashes(hashes: np.ndarray) -> Iterator[list[tuple[int, int]]]:
    """Yield pairs (i, j), i < j, whose hashes are near, for some rows i at a time."""
    columns = np.ascontiguousarray(hashes.T)
    for start in range(0, len(hashes), _HASH_ROWS):
        differing = (
            np.bitwise_count(column[start : start + _HASH_ROWS, None] ^ column[None, start:])
            for column in columns
        )
        fine = next(differing)
        for _ in range(3):
            # 255 stands for 255 and 256.
            fine = fine + np.minimum(next(differing), 255 - fine)
        near = (fine <= MAX_FINE_DISTANCE) | (next(differing) <= MAX_COARSE_DISTANCE)
        rows, others = np.nonzero(near)
        later = others > rows
        first, second = start + rows[later], start + others[later]
        yield list(zip(first.tolist(), second.tolist(), strict=True))


def same_picture(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Tell of each pair of pictures whether one is a copy of the other.

    Args:
        first: uint8 of shape (n, 32, 32, 3).
        second: of the same shape.

    Returns:
        bool of shape (n,).
    """
    one, other = aligned_difference(first, second), aligned_difference(second, first)
    # Whichever way fits: only the whole picture can be laid over the cropped one.
    rms, local = np.minimum(one, other)
    return (rms <= MAX_RMS) & (local <= MAX_LOCAL)


def aligned_difference(moved: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Lay one picture of each pair over the other, and return by how much they still differ.

    Args:
        moved: uint8 of shape (n, 32, 32, 3).
        fixed: of the same shape.

    Returns:
        Shape (2, n), grey levels: root mean square of the difference, and the mean of the 3 x 3
        pixels that differ most. Where a picture is white, or brightened to white, it is not
        compared.
    """
    n = len(moved)
    compared = maximum_filter(fixed, (1, 3, 3, 1)) < _CLIPPED
    moved, fixed = _blurred(moved), _blurred(fixed)
    transform = np.tile(_UNMOVED, (n, 1))
    x, y = _SIDE[_INNER][None, None, :, None], _SIDE[_INNER][None, :, None, None]
    target = fixed[:, _INNER, _INNER]
    for step in range(_STEPS + 1):
        columns, rows = (
            _sampler(transform[:, 0], transform[:, 1]),
            _sampler(transform[:, 2], transform[:, 3]),
        )
        warped = np.einsum("nij,njkc->nikc", rows, moved, optimize=True)
        warped = np.einsum("nij,nkjc->nkic", columns, warped, optimize=True)
        weight = (compared & (warped < _CLIPPED))[:, _INNER, _INNER].astype(np.float32)
        inner = warped[:, _INNER, _INNER]
        terms = [inner, np.ones_like(inner)]  # gain and offset: brightness and contrast
        if step < _STEPS:
            by_y, by_x = (
                slope[:, _INNER, _INNER] * (THUMBNAIL_SIZE - 1) / 2
                for slope in np.gradient(warped, axis=(1, 2))
            )
            terms += [x * by_x, by_x, y * by_y, by_y]
        fit = _least_squares(terms, target, weight)
        if step < _STEPS:
            change = fit[:, 2:] / np.maximum(fit[:, :1], 0.3)
            transform = np.clip(transform + change, _UNMOVED - _MAX_CROP, _UNMOVED + _MAX_CROP)
    gain, offset = fit[:, 0, None, None, None], fit[:, 1, None, None, None]
    difference = np.abs((gain * inner + offset - target) * weight).max(-1)
    rms = np.sqrt((difference**2).mean((1, 2)))
    rms[weight.mean((1, 2, 3)) < _LEAST_COMPARED] = np.inf
    return np.stack([rms, uniform_filter(difference, (0, 3, 3)).max((1, 2))])


def _blurred(images: np.ndarray) -> np.ndarray:
    pixels = gaussian_filter1d(images.astype(np.float32), _BLUR, axis=1)
    return gaussian_filter1d(pixels, _BLUR, axis=2)


def _sampler(scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return matrices (n, 32, 32) that interpolate a row linearly at scale * side + shift."""
    at = (_SIDE * scale[:, None] + shift[:, None] + 1) * (THUMBNAIL_SIZE - 1) / 2
    at = at.clip(0, THUMBNAIL_SIZE - 1)
    return np.maximum(0, 1 - np.abs(at[:, :, None] - np.arange(THUMBNAIL_SIZE, dtype=np.float32)))


def _least_squares(terms: list[np.ndarray], target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return by pair the factors, shape (n, terms), that make the terms' sum nearest to target."""
    n = len(target)
    matrix = np.stack([(term * weight).reshape(n, -1) for term in terms], axis=1)
    right = (target * weight).reshape(n, -1, 1)
    # The small diagonal keeps it solvable where nothing is left to compare.
    squares = matrix @ matrix.transpose(0, 2, 1) + 1e-3 * np.eye(len(terms), dtype=np.float32)
    return np.linalg.solve(squares, matrix @ right)[:, :, 0]
