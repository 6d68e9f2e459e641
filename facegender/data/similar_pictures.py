"""Finds pairs of pictures that resemble each other, and may be one picture.

A picture is described by its lowest frequencies, in grey and in colour, as it is and as it would
look cropped, turned, mirrored or brightened. Pictures whose plain description is near one of these
are candidates. To avoid comparing all with all, pictures are sorted into cells around some of them,
and only the nearest cells are searched (an inverted file: Jégou, Douze and Schmid, "Product
quantization for nearest neighbor search", PAMI 2011).
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from facegender.data import alignment
from facegender.data.alignment import LUMA, SIDE, SIZE
from facegender.data.fingerprint_store import Thumbnails

# Least correlation of the descriptions of a candidate pair: in grey, in colour, and in grey after
# the warp is refined.
MIN_GREY = 0.90
MIN_COLOUR = 0.95
MIN_REFINED = 0.97

_FREQUENCIES = 12  # half waves a side, in grey
_COLOUR_FREQUENCIES = 5
_COLOURLESS = 150.0  # length below which a description in colour is noise
_LEVELS = 200  # length of a description in whole numbers, whose sums are exact in any order
_CELL = 256  # pictures
_PROBES = 8  # cells searched for each description
_BLOCK = 512  # pictures described at a time, and searched for between two updates of the groups
_TASK = 128  # pictures of a block that one thread searches for: each reads every cell
_WARPED = 32  # pictures warped at a time; their arrays fit into a core's cache
_REFINED = 64  # others whose warps are refined for each picture
MOST = 8  # of these, candidates: 64 found no more altered copies among 240,000 drawings
_MANY = 500_000  # pairs held before the best are chosen


@dataclass(frozen=True)
class Candidates:
    """Pairs that may be one picture, with their warps: at most MOST for each picture.

    Attributes:
        moved: index of the picture that is cropped, turned or mirrored, shape (n,).
        fixed: index of the other picture, shape (n,).
        matrix: see `alignment.same_picture`, shape (n, 2, 2).
        shift: see `alignment.same_picture`, shape (n, 2).
        searched: index of each picture that was searched for.
        crowded: those that resemble more others, the least likely of which are left out.
        upto: number of pictures that have been searched for so far.
    """

    moved: np.ndarray
    fixed: np.ndarray
    matrix: np.ndarray
    shift: np.ndarray
    searched: np.ndarray
    crowded: np.ndarray
    upto: int


def find_candidates(
    thumbnails: np.ndarray | Thumbnails,
    groups: np.ndarray,
    run: Callable[..., Iterable[tuple[np.ndarray, ...]]] = map,
) -> Iterator[Candidates]:
    """Yield the candidates for some pictures at a time.

    If one of a crowded picture's candidates turns out to be the same picture, the search for that
    picture is repeated, and leaves out its group.

    Args:
        thumbnails: uint8 of shape (n, 32, 32, 3); may be mapped from a file.
        groups: shape (n,): pictures with the same number are known to be one, and are not
            candidates. The caller updates it after each step.
        run: `map`, or the map of a pool of threads.
    """
    n = len(thumbnails)
    search = functools.partial(_search, thumbnails, _Index(thumbnails), groups)
    for start in range(0, n, _BLOCK):
        some = np.arange(start, min(start + _BLOCK, n))
        upto = start + len(some)
        while len(some):
            tasks = (some[at : at + _TASK] for at in range(0, len(some), _TASK))
            found = zip(*run(search, tasks), strict=True)
            moved, fixed, matrix, shift, crowded = map(np.concatenate, found)
            yield Candidates(moved, fixed, matrix, shift, some, crowded, upto)
            some = np.intersect1d(crowded, moved[groups[moved] == groups[fixed]])


def _search(
    thumbnails: np.ndarray | Thumbnails, index: "_Index", groups: np.ndarray, some: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Return the arrays moved, fixed, matrix, shift and crowded for some of the pictures."""
    moved, fixed, warp, crowded = index.search(thumbnails[some], some, groups)
    matrix, shift, alike = _refine(thumbnails, index.grey[fixed], moved, warp)
    near = np.flatnonzero(alike >= MIN_REFINED)
    near = near[np.lexsort([fixed[near], -alike[near], moved[near]])]
    rank = _rank(moved[near])
    crowded = np.union1d(crowded, moved[near[rank == MOST]])
    near = near[rank < MOST]
    return moved[near], fixed[near], matrix[near], shift[near], crowded


class _Index:
    """The plain descriptions of all pictures, sorted into cells."""

    def __init__(self, thumbnails: np.ndarray | Thumbnails) -> None:
        n = len(thumbnails)
        grey, colour = [], []
        for start in range(0, n, _BLOCK):
            described = _describe(thumbnails[start : start + _BLOCK], plain=True)
            grey.append(described[0][:, 0].astype(np.int8))
            colour.append(described[1][:, 0].astype(np.int8))
        self.grey, self.colour = np.concatenate(grey), np.concatenate(colour)
        cells = max(1, n // _CELL)
        self.pivots = self.grey[np.arange(cells) * n // cells].astype(np.float32)
        cell = np.concatenate(
            [
                (self.grey[start : start + 1024].astype(np.float32) @ self.pivots.T).argmax(1)
                for start in range(0, n, 1024)
            ]
        )
        self.members = np.argsort(cell, kind="stable")
        self.bounds = np.searchsorted(cell[self.members], np.arange(cells + 1))

    def search(
        self, thumbnails: np.ndarray, some: np.ndarray, groups: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the arrays moved, fixed and warp (the best of each pair), and crowded pictures.

        Args:
            thumbnails: some of the pictures.
            some: index of each of them.
            groups: group of each picture, as in `find_candidates`.
        """
        grey, colour = _describe(thumbnails)
        warps = grey.shape[1]
        grey, colour = (part.reshape(-1, part.shape[-1]) for part in (grey, colour))
        colourless = np.asarray(~colour.any(1))
        probes = min(_PROBES, len(self.pivots))
        nearest = np.argpartition(grey @ self.pivots.T, -probes, axis=1)[:, -probes:].ravel()
        rows_by_cell = np.argsort(nearest, kind="stable")
        bounds = np.searchsorted(nearest[rows_by_cell], np.arange(len(self.pivots) + 1))
        found: list[np.ndarray] = []
        crowded = np.zeros(0, np.int64)
        held = 0
        for cell in np.unique(nearest):
            rows = rows_by_cell[bounds[cell] : bounds[cell + 1]] // probes
            members = self.members[self.bounds[cell] : self.bounds[cell + 1]]
            alike = grey[rows] @ self.grey[members].astype(np.float32).T
            near = alike >= MIN_GREY * _LEVELS**2
            if not near.any():
                continue
            tints = self.colour[members].astype(np.float32)
            tinted = colour[rows] @ tints.T >= MIN_COLOUR * _LEVELS**2
            near &= tinted | colourless[rows, None] | ~tints.any(1)
            row, member = np.nonzero(near)
            query, other = rows[row], members[member]
            moved = some[query // warps]
            new = groups[moved] != groups[other]
            found.append(
                np.stack([moved, other, query % warps, alike[row, member].astype(np.int64)])[:, new]
            )
            held += new.sum()
            if held > _MANY:
                best, more = _best(np.concatenate(found, axis=1))
                found, held = [best], best.shape[1]
                crowded = np.union1d(crowded, more)
        if not found:
            return (np.zeros(0, np.int64),) * 4
        (moved, other, warp, _), more = _best(np.concatenate(found, axis=1))
        return moved, other, warp, np.union1d(crowded, more)


def _best(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep the best warp of each pair, and the _REFINED best pairs of each moved picture.

    Args:
        pairs: rows moved, other, warp and likeness; shape (4, n).

    Returns:
        The pairs that are kept, and the pictures that had more.
    """
    moved, other, warp, alike = pairs
    pairs = pairs[:, np.lexsort([warp, -alike, other, moved])]
    first = np.ones(pairs.shape[1], bool)
    first[1:] = (np.diff(pairs[:2]) != 0).any(0)
    pairs = pairs[:, first]
    pairs = pairs[:, np.lexsort([pairs[1], -pairs[3], pairs[0]])]
    rank = _rank(pairs[0])
    return pairs[:, rank < _REFINED], np.unique(pairs[0, rank == _REFINED])


def _rank(ordered: np.ndarray) -> np.ndarray:
    """Return how many equal numbers precede each one."""
    return np.arange(len(ordered)) - np.searchsorted(ordered, ordered)


def _refine(
    thumbnails: np.ndarray | Thumbnails, target: np.ndarray, moved: np.ndarray, warp: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Improve warps by one Gauss-Newton step on the descriptions.

    Args:
        thumbnails: all pictures.
        target: descriptions of the pictures that are not moved, shape (n, k).
        moved: index of the pictures that are moved, shape (n,).
        warp: index of the warp that makes them most alike, shape (n,).

    Returns:
        The improved warps as matrices and shifts, and the correlation of the descriptions.
    """
    matrix, shift, _ = (part[warp] for part in _warps())
    # Pairs may share a picture and its warp.
    warps = len(_warps()[0])
    views, view = np.unique(moved * warps + warp, return_inverse=True)
    pieces = [views[at : at + _WARPED] for at in range(0, max(1, len(views)), _WARPED)]
    terms = np.concatenate([_terms(thumbnails[piece // warps], piece % warps) for piece in pieces])
    terms = terms[view]
    goal = target.astype(np.float32)
    fit = alignment.least_squares(terms, goal, np.ones_like(goal))
    left = ((fit[:, None] @ terms)[:, 0] - goal).astype(np.float32)
    alike = np.sqrt(np.maximum(1 - (left**2).sum(1) / np.maximum((goal**2).sum(1), 1), 0))
    matrix, shift = alignment.compose(matrix, shift, fit[:, 1:] / np.maximum(fit[:, :1], 1e-6))
    return matrix, shift, np.where(fit[:, 0] > 0, alike, 0)


def _terms(thumbnails: np.ndarray, warp: np.ndarray) -> np.ndarray:
    """Return descriptions of warped pictures, and their derivatives by affine change: (n, 7, k)."""
    n = len(thumbnails)
    matrix, shift, gain = (part[warp] for part in _warps())
    light = np.minimum((thumbnails @ LUMA).reshape(n, SIZE * SIZE) * gain[:, None], 255)
    warped = alignment.sample(light[:, None], matrix, shift)[0]
    return np.concatenate([warped, alignment.slopes(warped[:, 0])], 1) @ _grey_basis().T


def _describe(thumbnails: np.ndarray, *, plain: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Describe pictures under each warp, or as they are.

    Returns:
        Descriptions in grey, shape (n, warps, k), and in colour, zero without colour. Whole numbers
        as float32.
    """
    n = len(thumbnails)
    grey_operator, colour_operator = _operators()
    gains = _warps()[2]
    if plain:
        grey_operator, colour_operator, gains = grey_operator[:1], colour_operator[:1], gains[:1]
    pixels = thumbnails.reshape(n, -1, 3).astype(np.float32)
    parts = []
    for gain in np.unique(gains):
        image = np.minimum(pixels * gain, 255)
        light = image @ LUMA
        tint = image[..., ::2] - light[..., None]  # red and blue, which determine green
        mine = gains == gain
        grey = np.einsum("vki,ni->nvk", grey_operator[mine], light, optimize=True)
        colour = np.einsum("vki,nic->nvkc", colour_operator[mine], tint, optimize=True)
        parts.append((grey, colour.reshape(*colour.shape[:2], -1)))
    grey, colour = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    return _quantised(grey, 1e-3), _quantised(colour, _COLOURLESS)


def _quantised(described: np.ndarray, least: float) -> np.ndarray:
    length = np.linalg.norm(described, axis=-1, keepdims=True)
    scaled = np.rint(described * (_LEVELS / np.maximum(length, least))).clip(-127, 127)
    return np.where(length >= least, scaled, 0).astype(np.float32)


@functools.cache
def _warps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return matrices (warps, 2, 2), shifts (warps, 2) and gains in brightness (warps,)."""
    warps = [(1.0, 1.0, 0, 0.0, 0.0)]  # scale along x and y, degrees, shift along x and y
    warps += [(1.0, 1.0, degrees, 0.0, 0.0) for degrees in (5, -5)]
    warps += [(0.9, 0.9, 0, 0.0, 0.0), (0.8, 0.8, 0, 0.0, 0.0)]
    warps += [(0.88, 0.88, degrees, 0.0, 0.0) for degrees in (5, -5)]
    warps += [(0.9, 0.9, 0, x, y) for x in (0.1, -0.1) for y in (0.1, -0.1)]
    warps += [(0.9, 1.0, 0, x, 0.0) for x in (0.1, -0.1)]
    warps += [(1.0, 0.9, 0, 0.0, y) for y in (0.1, -0.1)]
    matrices, shifts, gains = [], [], []
    for gain, mirror, those in [
        (1.0, 1, warps),
        (1.0, -1, warps),
        (1.2, 1, warps[:1]),
        (1.4, 1, warps[:1]),
    ]:
        for across, down, degrees, x, y in those:
            angle = np.deg2rad(degrees)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            matrices.append(turn @ np.diag([across * mirror, down]))
            shifts.append((x, y))
            gains.append(gain)
    return np.array(matrices, np.float32), np.array(shifts, np.float32), np.array(gains, np.float32)


@functools.cache
def _operators() -> tuple[np.ndarray, np.ndarray]:
    """Return matrices that describe a picture under each warp, in grey and in colour.

    Their shape is (warps, k, pixels).
    """
    pixels = SIZE * SIZE
    unit = np.eye(pixels, dtype=np.float32).reshape(1, pixels, pixels)
    grey, colour = [], []
    for matrix, shift, _ in zip(*_warps(), strict=True):
        # Column i is the warped picture of a single 1 at pixel i.
        warp = alignment.sample(unit, matrix[None], shift[None])[0][0].T
        grey.append(_grey_basis() @ warp)
        colour.append(_colour_basis() @ warp)
    return np.stack(grey), np.stack(colour)


@functools.cache
def _grey_basis() -> np.ndarray:
    waves, frequency, window = _cosines(_FREQUENCIES)
    waves, frequency = waves[frequency > 0], frequency[frequency > 0]
    # A uniform grey must not count.
    waves -= waves.sum(1, keepdims=True) * window / window.sum()
    waves *= (frequency / np.linalg.norm(waves, axis=1))[:, None]
    return waves.astype(np.float32)


@functools.cache
def _colour_basis() -> np.ndarray:
    waves, frequency, _ = _cosines(_COLOUR_FREQUENCIES)
    waves *= ((1 + frequency) / np.linalg.norm(waves, axis=1))[:, None]
    return waves.astype(np.float32)


def _cosines(most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return windowed cosines below a frequency, (k, pixels), their frequencies, and the window."""
    side = np.arange(most)
    wave = np.cos(np.pi * (np.arange(SIZE) + 0.5) * side[:, None] / SIZE)
    edge = np.cos(SIDE.astype(np.float64) * 1.4) ** 0.75
    window = np.outer(edge, edge).ravel()
    waves = np.einsum("ay,bx->abyx", wave, wave).reshape(most * most, -1) * window
    frequency = np.hypot(*np.meshgrid(side, side)).ravel()
    low = frequency < most
    return waves[low], frequency[low], window
