"""Decides whether two small pictures are one, even if one was cropped, turned, mirrored or toned.

An affine map aligns one picture with the other, by the method of Lucas and Kanade ("An iterative
image registration technique with an application to stereo vision", IJCAI 1981). Brightness and
saturation are fitted, and the remaining difference decides. `python -m bench.duplicates` prints the
differences that the limits below separate.
"""

from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter1d, uniform_filter

from facegender.data.fingerprints import THUMBNAIL_SIZE as SIZE

# Largest differences of aligned pictures, as shares of the contrast (the standard deviation of
# levels) where they are compared: root mean square, and the mean of the 3 x 3 pixels that differ
# most.
MAX_RMS = 0.12
MAX_LOCAL = 0.34
# Contrast, in grey levels, below which it is noise of the encoding.
LEAST_CONTRAST = 4.0
# Least shares of a picture that the other must cover, and that must not be clipped in both.
LEAST_COVERED = 0.5
LEAST_COMPARED = 0.05

LUMA = np.array([0.299, 0.587, 0.114], np.float32)

_STEPS = 2  # of the alignment; five change no verdict
_REACH = 0.15  # largest change of a warp by the alignment, as a share of half a side
_BLUR = 0.7  # pixels
_MARGIN = 1.5  # pixels at the border, which a crop or a rotation spoils
_WHITE, _BLACK = 246, 6  # levels from which, and up to which, a pixel may be clipped
_UNLIKE = 0.95  # correlation below which aligned pictures need no closer look
_FAR = 2  # multiple of the limits beyond which a pair is not compared in the other frame

SIDE = ((np.arange(SIZE) + 0.5) / SIZE * 2 - 1).astype(np.float32)
# Coordinates x, y of each pixel, from -1 to 1: shape (2, pixels).
GRID = np.stack([np.tile(SIDE, SIZE), np.repeat(SIDE, SIZE)])
_KERNEL = gaussian_filter1d(np.eye(SIZE, dtype=np.float32), _BLUR, axis=0, mode="nearest")
_CENTRE = np.outer(np.cos(SIDE * 1.4), np.cos(SIDE * 1.4)).ravel()
_INNER = (np.abs(GRID) <= 1 - 2 * _MARGIN / SIZE).all(0)


def same_picture(
    moved: np.ndarray, fixed: np.ndarray, matrix: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """Return whether one picture of each pair is a copy of the other.

    Args:
        moved: uint8 of shape (n, 32, 32, 3).
        fixed: picture of the same shape.
        matrix: float32 of shape (n, 2, 2): start of the alignment. The pixel of `fixed` at p is
            expected in `moved` at matrix @ p + shift, with coordinates from -1 to 1.
        shift: float32 of shape (n, 2).

    Returns:
        bool of shape (n,).
    """
    rms, local = aligned_difference(moved, fixed, matrix, shift)
    return (rms <= MAX_RMS) & (local <= MAX_LOCAL)


def aligned_difference(
    moved: np.ndarray, fixed: np.ndarray, matrix: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """Align the pictures of each pair, and return how much they still differ.

    Each is predicted from the other, in the frame of each, and the smallest difference counts,
    because a crop cannot predict the whole picture, nor a grey picture the coloured one. The second
    frame is left out if the first is far from the limits.

    Returns:
        Shape (2, n), shares of the contrast: root mean square of the difference, and the mean of
        the 3 x 3 pixels that differ most; infinite where too little can be compared.
    """
    n = len(moved)
    result = np.full((2, n), np.inf, np.float32)
    if not n:
        return result
    matrix, shift, alike = _align(moved, fixed, matrix, shift)
    near = np.flatnonzero(alike > _UNLIKE)
    if not len(near):
        return result
    moved, fixed, matrix, shift = moved[near], fixed[near], matrix[near], shift[near]
    result[:, near] = first = _difference(moved, fixed, matrix, shift)
    close = np.flatnonzero(excess(first) <= _FAR)
    if not len(close):
        return result
    back = np.linalg.inv(matrix[close])
    shift = -(back @ shift[close, :, None])[:, :, 0]
    second = _difference(fixed[close], moved[close], back, shift)
    result[:, near[close]] = _least(first[:, close], second)
    return result


def sample(
    pictures: np.ndarray, matrix: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate pictures, shape (n, channels, pixels), at matrix @ p + shift for each pixel p.

    Returns:
        The pictures, and which pixels lie inside the one that was interpolated: (n, pixels).
    """
    n, channels, pixels = pictures.shape
    at = matrix @ GRID + shift[:, :, None]
    inside = (np.abs(at) <= 1 - 2 * _MARGIN / SIZE).all(1)
    at = ((at + 1) * (SIZE / 2) - 0.5).clip(0, SIZE - 1.001)
    corner = at.astype(np.int32)
    x, y = (at - corner).transpose(1, 0, 2)[:, :, None]
    planes = np.arange(n * channels).reshape(n, channels, 1) * pixels
    first = planes + (corner[:, 1] * SIZE + corner[:, 0])[:, None]
    flat = pictures.ravel()
    top = flat.take(first) * (1 - x) + flat.take(first + 1) * x
    bottom = flat.take(first + SIZE) * (1 - x) + flat.take(first + SIZE + 1) * x
    return top + y * (bottom - top), inside


def slopes(pictures: np.ndarray) -> np.ndarray:
    """Return the derivatives of grey pictures by each parameter of an affine change.

    Args:
        pictures: shape (n, pixels).

    Returns:
        Shape (n, 6, pixels), for x' = x + a x + b y + c and y' = y + d x + e y + f.
    """
    square = pictures.reshape(len(pictures), SIZE, SIZE)
    by_y, by_x = (
        slope.reshape(pictures.shape) * (SIZE / 2) for slope in np.gradient(square, axis=(1, 2))
    )
    x, y = GRID
    return np.stack([by_x * x, by_x * y, by_x, by_y * x, by_y * y, by_y], axis=1)


def compose(
    matrix: np.ndarray, shift: np.ndarray, change: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the warp that applies a change, as in `slopes`, before a given warp."""
    change = change.clip(-_REACH, _REACH).reshape(-1, 2, 3)
    moved = (matrix @ change[:, :, 2:])[:, :, 0]
    return matrix + matrix @ change[:, :, :2], shift + moved


def least_squares(terms: np.ndarray, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the weighted least-squares factors of terms, shape (n, terms), for each pair.

    Args:
        terms: shape (n, terms, pixels).
        target: shape (n, pixels).
        weight: shape (n, pixels).
    """
    weighted = terms * weight[:, None]
    # The small diagonal keeps it solvable where nothing is left to compare.
    squares = weighted @ terms.transpose(0, 2, 1) + 1e-2 * np.eye(terms.shape[1], dtype=np.float32)
    right = weighted @ target[..., None]
    return np.linalg.solve(squares.astype(np.float64), right)[:, :, 0].astype(np.float32)


def _align(
    moved: np.ndarray, fixed: np.ndarray, matrix: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the warp that aligns the pictures best in grey, and their correlation."""
    n = len(moved)
    source, target = (_blurred((pictures @ LUMA).reshape(n, 1, -1)) for pictures in (moved, fixed))
    target = target[:, 0]
    start = matrix, shift
    for step in range(_STEPS + 1):
        warped, inside = sample(source, matrix, shift)
        warped = warped[:, 0]
        cut_off = ((warped >= _WHITE) & (target >= _WHITE)) | (
            (warped <= _BLACK) & (target <= _BLACK)
        )
        weight = inside * _CENTRE * ~cut_off
        if step == _STEPS:
            break
        terms = np.concatenate([np.stack([warped, np.ones_like(warped)], 1), slopes(warped)], 1)
        fit = least_squares(terms, target, weight)
        matrix, shift = compose(matrix, shift, fit[:, 2:] / np.maximum(fit[:, :1], 0.3))
        matrix = matrix.clip(start[0] - _REACH, start[0] + _REACH)
        shift = shift.clip(start[1] - _REACH, start[1] + _REACH)
    return matrix, shift, _correlation(warped, target, weight)


def _correlation(one: np.ndarray, other: np.ndarray, weight: np.ndarray) -> np.ndarray:
    total = np.maximum(weight.sum(1, keepdims=True), 1e-6)
    one, other = (p - (p * weight).sum(1, keepdims=True) / total for p in (one, other))
    product = (one * other * weight).sum(1)
    squares = (one**2 * weight).sum(1) * (other**2 * weight).sum(1)
    return product / np.sqrt(np.maximum(squares, 1e-6))


def _difference(
    moved: np.ndarray, fixed: np.ndarray, matrix: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """Return how much aligned pictures differ in the frame of `fixed`, shape (2, n)."""
    warped, inside = sample(_planes(moved), matrix, shift)
    seen = inside & _INNER
    one, other = _tones(warped), _tones(_planes(fixed))
    return _least(_unexplained(one, other, seen), _unexplained(other, one, seen))


def _least(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.where(excess(first) <= excess(second), first, second)


def excess(difference: np.ndarray) -> np.ndarray:
    """Return the larger difference of `aligned_difference`, as a multiple of its limit: (n,)."""
    return np.maximum(difference[0] / MAX_RMS, difference[1] / MAX_LOCAL)


class _Tones(NamedTuple):
    """Pictures, prepared for comparison.

    Attributes:
        levels: shape (n, 3, pixels).
        blurred: blurred `levels`.
        grey: luma of `blurred`, shape (n, 1, pixels).
        white: whether a level of `blurred`, or one next to it, is at white.
        black: whether a level of `blurred`, or one next to it, is at black.
    """

    levels: np.ndarray
    blurred: np.ndarray
    grey: np.ndarray
    white: np.ndarray
    black: np.ndarray


def _tones(pictures: np.ndarray) -> _Tones:
    blurred = _blurred(pictures)
    white, black = _dilated(blurred >= _WHITE), _dilated(blurred <= _BLACK)
    return _Tones(pictures, blurred, (LUMA @ blurred)[:, None], white, black)


def _unexplained(source: _Tones, target: _Tones, seen: np.ndarray) -> np.ndarray:
    """Return how much a target differs from its prediction from an aligned source.

    The brightness of the source gets a gain and an offset, and its colours a factor of at least 0
    (grey). A channel is not compared where it is clipped both in the target and in the prediction.

    Args:
        source: n pictures.
        target: pictures of the same shape.
        seen: bool (n, pixels): where the pictures overlap.

    Returns:
        Shape (2, n), as in `aligned_difference`.
    """
    n = len(seen)
    cut_off = (source.white | target.white | source.black | target.black).any(1)
    weight = seen * (~cut_off + np.float32(1e-3))
    terms = np.concatenate([source.grey, np.full_like(source.grey, 128)], 1)
    gain, offset = least_squares(terms, target.grey[:, 0], weight).T[:, :, None, None]
    colour, colour_target = source.blurred - source.grey, target.blurred - target.grey
    strength = (colour * colour_target * weight[:, None]).sum((1, 2)) / np.maximum(
        (colour**2 * weight[:, None]).sum((1, 2)), 1
    )
    strength = strength.clip(0, 3)[:, None, None]
    grey = (LUMA @ source.levels)[:, None]
    image = gain * grey + 128 * offset + strength * (source.levels - grey)
    # Clipped before it is blurred, as the picture itself was.
    image, unlimited = _blurred(image.clip(0, 255)), _blurred(image)
    clipped = (target.white & _dilated(unlimited >= _WHITE)) | (
        target.black & _dilated(unlimited <= _BLACK)
    )
    compared = seen & ~clipped.all(1)
    difference = (np.abs(image - target.blurred) * ~clipped).max(1) * seen
    count = np.maximum(compared.sum(1), 1)
    mean = (target.blurred * compared[:, None]).sum(2, keepdims=True) / count[:, None, None]
    spread = ((target.blurred - mean) ** 2).mean(1)
    contrast = np.sqrt((spread * compared).sum(1) / count)
    local = uniform_filter(difference.reshape(n, SIZE, SIZE), (0, 3, 3)).max((1, 2))
    result = np.stack([np.sqrt((difference**2).sum(1) / count), local])
    result /= np.maximum(contrast, LEAST_CONTRAST)
    too_little = (seen.mean(1) < LEAST_COVERED) | (compared.mean(1) < LEAST_COMPARED)
    result[:, too_little | (contrast < LEAST_CONTRAST / 2)] = np.inf
    return result


def _planes(pictures: np.ndarray) -> np.ndarray:
    """Return pictures of shape (n, 32, 32, 3) as float32 (n, 3, pixels)."""
    planes = pictures.reshape(len(pictures), SIZE * SIZE, 3).transpose(0, 2, 1)
    return np.ascontiguousarray(planes, np.float32)


def _blurred(pictures: np.ndarray) -> np.ndarray:
    """Blur pictures of shape (n, channels, pixels)."""
    square = pictures.reshape(*pictures.shape[:2], SIZE, SIZE)
    return (_KERNEL @ square @ _KERNEL.T).reshape(pictures.shape)


def _dilated(pixels: np.ndarray) -> np.ndarray:
    """Return a mask, shape (n, channels, pixels), dilated by one pixel."""
    square = pixels.reshape(*pixels.shape[:2], SIZE, SIZE)
    rows = square.copy()
    rows[:, :, 1:] |= square[:, :, :-1]
    rows[:, :, :-1] |= square[:, :, 1:]
    both = rows.copy()
    both[..., 1:] |= rows[..., :-1]
    both[..., :-1] |= rows[..., 1:]
    return both.reshape(pixels.shape)
