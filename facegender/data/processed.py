"""Processed data: the decoded and resized images of each split in one array on disk.

A split is a directory with `images.npy` (uint8, (n, size, size, 3), NumPy's own format) and
`index.csv`, the rows of the manifest whose image could be decoded, in the order of the array
(column `row`). A training split may also hold `wide.npy`, the same images with a border, to cut at
random. Training reads rows from the page cache, and never holds all images in memory.
"""

import os
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from facegender.data.manifest import read_manifest
from facegender.errors import UserError

_WIDE = "wide.npy"


class ProcessedSplit:
    """A split of the processed data, open for reading.

    Attributes:
        images: memory-mapped uint8 array of shape (n, size, size, 3), for single images; `read`
            and `batches` are for passes over all of them.
        index: rows of the manifest, with `row`, the index into `images`.
    """

    def __init__(self, directory: Path, array: str = "images.npy") -> None:
        """Open the split that `preprocessing.write_split` wrote, with the images of `array`.

        Raises:
            UserError: the directory holds no processed split.
        """
        self.directory = directory
        try:
            self.images: np.memmap = np.load(directory / array, mmap_mode="r", allow_pickle=False)
            self.index = read_manifest(directory / "index.csv")
            self._descriptor = os.open(directory / array, os.O_RDONLY)
        except (OSError, ValueError) as error:
            raise UserError(
                f"Cannot read the processed data in {directory.name}/: {error}. Run `dvc repro "
                "preprocess` to create it again."
            ) from error
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.index)

    @cached_property
    def wide(self) -> "ProcessedSplit | None":
        """The same images with a border around what the model sees, or None."""
        exists = (self.directory / _WIDE).exists()
        return ProcessedSplit(self.directory, _WIDE) if exists else None

    @property
    def files(self) -> list[Path]:
        """All files of the split."""
        names = ["images.npy", "index.csv", *([_WIDE] if self.wide else [])]
        return [self.directory / name for name in names]

    @property
    def labels(self) -> np.ndarray:
        """Labels in the order of the index: int64 of shape (n,)."""
        return self.index["label"].to_numpy(dtype=np.int64)

    @cached_property
    def rows(self) -> np.ndarray:
        """Rows of `images` in the order of the index: int64 of shape (n,)."""
        return self.index["row"].to_numpy(dtype=np.int64)

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Return the images of some rows of the index: uint8 of shape (k, size, size, 3).

        Thread-safe.

        Args:
            positions: row numbers of shape (k,), in any order.

        Raises:
            OSError: the file has become shorter since it was opened.
        """
        images = np.empty((len(positions), *self.images.shape[1:]), np.uint8)
        # Plain reads, because mapped pages would count as this process's memory.
        for image, row in zip(images, self.rows[positions].tolist(), strict=True):
            start = self.images.offset + row * image.nbytes
            if os.preadv(self._descriptor, [image], start) != image.nbytes:
                raise OSError(f"The array of images ends within row {row}")
        return images

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yield the images in order: uint8 arrays of shape (up to batch_size, size, size, 3)."""
        for start in range(0, len(self), batch_size):
            yield self.read(np.arange(start, min(start + batch_size, len(self))))
