"""Whether two small pictures are one, however one of them was cropped, turned, mirrored or toned.

One picture is laid over the other until they agree best, by the method of Lucas and Kanade ("An
iterative image registration technique with an application to stereo vision", IJCAI 1981), by an
affine map. What differs after that, and after a fit of brightness and saturation, decides.
`python -m bench.duplicates` prints the distances that the limits below stand between.
"""

import numpy as np
from scipy.ndimage import gaussian_filter1d, maximum_filter, minimum_filter, uniform_filter

from facegender.data.fingerprints import THUMBNAIL_SIZE as SIZE

# By how much aligned pictures may differ, as a share of the contrast (the standard deviation of
# levels) where they are compared: root mean square, and the mean of the 3 x 3 pixels that
# differ most.
MAX_RMS = 0.12
MAX_LOCAL = 0.34
# Grey levels below which contrast is noise of the encoding.
LEAST_CONTRAST = 4.0
# Shares of a picture: what the other must cover, and what of it must not be clipped in both.
LEAST_COVERED = 0.5
LEAST_COMPARED = 0.05

LUMA = np.array([0.299, 0.587, 0.114], np.float32)

_STEPS = 5  # of the alignment
_REACH = 0.15  # by which the alignment may change a warp, of half a side
_BLUR = 0.7  # pixels
_MARGIN = 1.5  # pixels at the border, which a crop or a rotation spoils
_WHITE, _BLACK = 246, 6  # from which, and up to which, a level may have been cut off
_UNLIKE = 0.95  # correlation below which aligned pictures need no closer look

SIDE = ((np.arange(SIZE) + 0.5) / SIZE * 2 - 1).astype(np.float32)
# Coordinates x, y of each pixel, from -1 to 1: shape (2, pixels).
GRID = np.stack([np.tile(SIDE, SIZE), np.repeat(SIDE, SIZE)])
_CENTRE = np.outer(np.cos(SIDE * 1.4), np.cos(SIDE * 1.4)).ravel()
_INNER = (np.abs(GRID) <= 1 - 2 * _MARGIN / SIZE).all(0)


def same_picture(
    moved: np.ndarray, fixed: np.ndarray, matrix: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """Return whether one picture of each pair is a copy of the other.

    Args:
        moved: uint8 of shape (n, 32, 32, 3).
        fixed: picture of the same shape.
        matrix: float32 of shape (n, 2, 2): where the alignment starts. The pixel of `fixed` at p is
            looked for in `moved` at matrix @ p + shift, with coordinates from -1 to 1.
        shift: float32 of shape (n, 2).

    Returns:
        bool of shape (n,).
    """
    rms, local = aligned_difference(moved, fixed, matrix, shift)
    return (rms <= MAX_RMS) & (local <= MAX_LOCAL)


def aligned_difference(
    moved: np.ndarray, fixed: np.ndarray, matrix: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """Lay one picture of each pair over the other, and return by how much they still differ.

    Each is predicted from the other, in the frame of each, and the least difference counts: only
    the whole picture holds what a crop shows, only the coloured one the colours of a grey one.

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
    matrix, shift = matrix[near], shift[near]
    moved, fixed = (p[near].reshape(len(near), -1, 3).astype(np.float32) for p in (moved, fixed))
    back = np.linalg.inv(matrix)
    frames = [
        (*sample(moved, matrix, shift), fixed),
        (*sample(fixed, back, -(back @ shift[:, :, None])[:, :, 0]), moved),
    ]
    differences = []
    for warped, inside, target in frames:
        seen = inside & _INNER
        differences += [_unexplained(warped, target, seen), _unexplained(target, warped, seen)]
    found = np.stack(differences)
    worst = np.maximum(found[:, 0] / MAX_RMS, found[:, 1] / MAX_LOCAL).argmin(0)
    result[:, near] = found[worst, :, np.arange(len(near))].T
    return result


def sample(
    pictures: np.ndarray, matrix: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate pictures, shape (n, pixels, channels), at matrix @ p + shift for each pixel p.

    Returns:
        The pictures, and which pixels lie inside the one that was interpolated: (n, pixels).
    """
    n, pixels, channels = pictures.shape
    at = matrix @ GRID + shift[:, :, None]
    inside = (np.abs(at) <= 1 - 2 * _MARGIN / SIZE).all(1)
    at = ((at + 1) * (SIZE / 2) - 0.5).clip(0, SIZE - 1.001)
    corner = at.astype(np.int32)
    x, y = (at - corner).transpose(1, 0, 2)[..., None]
    first = np.arange(n)[:, None] * pixels + corner[:, 1] * SIZE + corner[:, 0]
    flat = pictures.reshape(n * pixels, channels)
    top = flat.take(first, 0) * (1 - x) + flat.take(first + 1, 0) * x
    bottom = flat.take(first + SIZE, 0) * (1 - x) + flat.take(first + SIZE + 1, 0) * x
    return top + y * (bottom - top), inside


def slopes(pictures: np.ndarray) -> np.ndarray:
    """Return by what each affine change of a grey picture alters it.

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
    """Return the warp that first changes p as `slopes` says, by (n, 6), and then is the given."""
    change = change.clip(-_REACH, _REACH).reshape(-1, 2, 3)
    moved = (matrix @ change[:, :, 2:])[:, :, 0]
    return matrix + matrix @ change[:, :, :2], shift + moved


def least_squares(terms: np.ndarray, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return by pair the factors, shape (n, terms), that make the terms' sum nearest to target.

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
    """Return the warp with which the pictures in grey agree best, and their correlation then."""
    n = len(moved)
    source, target = (_blurred((pictures @ LUMA).reshape(n, -1, 1)) for pictures in (moved, fixed))
    target = target[..., 0]
    start = matrix, shift
    for step in range(_STEPS + 1):
        warped, inside = sample(source, matrix, shift)
        warped = warped[..., 0]
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


def _unexplained(source: np.ndarray, target: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return what differs between aligned pictures when one is predicted from the other.

    Brightness of the target is that of the source by a gain and an offset, and its colours are the
    source's by a factor from 0 (grey) up. Where a channel is clipped in both, as seen and as
    predicted, it is not compared.

    Args:
        source: shape (n, pixels, 3).
        target: pictures of the same shape.
        seen: bool (n, pixels): where both pictures are.

    Returns:
        Shape (2, n), as `aligned_difference` does.
    """
    n = len(source)
    blurred, target = _blurred(source), _blurred(target)
    grey, grey_target = blurred @ LUMA, target @ LUMA
    colour, colour_target = blurred - grey[..., None], target - grey_target[..., None]
    bright, dark = _widest(target), _narrowest(target)
    whole = (
        (np.maximum(_widest(blurred), bright) < _WHITE)
        & (np.minimum(_narrowest(blurred), dark) > _BLACK)
    ).all(-1)
    weight = seen * (whole + np.float32(1e-3))

    terms = np.stack([grey, np.full_like(grey, 128)], 1)
    gain, offset = least_squares(terms, grey_target, weight).T[:, :, None]
    strength = (colour * colour_target * weight[..., None]).sum((1, 2)) / np.maximum(
        (colour**2 * weight[..., None]).sum((1, 2)), 1
    )
    grey = (source @ LUMA)[..., None]
    image = (
        gain[..., None] * grey
        + 128 * offset[..., None]
        + strength.clip(0, 3)[:, None, None] * (source - grey)
    )
    # Cut off before it is blurred, as in the picture itself.
    image, unlimited = _blurred(image.clip(0, 255)), _blurred(image)
    clipped = ((bright >= _WHITE) & (_widest(unlimited) >= _WHITE)) | (
        (dark <= _BLACK) & (_narrowest(unlimited) <= _BLACK)
    )
    compared = seen & ~clipped.all(-1)
    difference = (np.abs(image - target) * ~clipped).max(-1) * seen
    count = np.maximum(compared.sum(1), 1)
    mean = (target * compared[..., None]).sum(1, keepdims=True) / count[:, None, None]
    spread = ((target - mean) ** 2).mean(-1)
    contrast = np.sqrt((spread * compared).sum(1) / count)
    local = uniform_filter(difference.reshape(n, SIZE, SIZE), (0, 3, 3)).max((1, 2))
    result = np.stack([np.sqrt((difference**2).sum(1) / count), local])
    result /= np.maximum(contrast, LEAST_CONTRAST)
    too_little = (seen.mean(1) < LEAST_COVERED) | (compared.mean(1) < LEAST_COMPARED)
    result[:, too_little | (contrast < LEAST_CONTRAST / 2)] = np.inf
    return result


def _square(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(len(pictures), SIZE, SIZE, -1)


def _blurred(pictures: np.ndarray) -> np.ndarray:
    """Blur pictures of shape (n, pixels, channels)."""
    pixels = gaussian_filter1d(_square(pictures), _BLUR, axis=1, mode="nearest")
    return gaussian_filter1d(pixels, _BLUR, axis=2, mode="nearest").reshape(pictures.shape)


def _widest(pictures: np.ndarray) -> np.ndarray:
    return maximum_filter(_square(pictures), (1, 3, 3, 1)).reshape(pictures.shape)


def _narrowest(pictures: np.ndarray) -> np.ndarray:
    return minimum_filter(_square(pictures), (1, 3, 3, 1)).reshape(pictures.shape)
