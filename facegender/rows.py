"""Rows of processed data: what each process of preprocessing runs.

Apart from `preprocessing`, for a process imports this module anew: pandas alone would take longer
than decoding a thousand images.
"""

from pathlib import Path

from PIL import Image

from facegender.images import InvalidImage, decode_image


def write_rows(
    paths: list[Path], array: Path, *, offset: int, first_row: int, size: int
) -> tuple[int, dict[int, str]]:
    """Decode images into consecutive rows of an array on disk.

    Args:
        paths: images.
        array: file to write into; it has all its rows already.
        offset: bytes before its first row.
        first_row: row of the first of the images.
        size: pixels a side.

    Returns:
        How many images were tried, and by row the reasons why images could not be decoded.
    """
    # Pillow keeps the memory of this many images to use again; asking the system for new pages for
    # every image takes a fifth of the time of decoding it.
    Image.core.set_blocks_max(4)
    reasons = {}
    row_bytes = size * size * 3
    # Plain writes, not a memory map: mapped pages would count as this process's memory.
    with array.open("r+b") as file:
        for row, path in enumerate(paths, first_row):
            try:
                pixels = decode_image(path, size)
            except InvalidImage as error:
                reasons[row] = str(error)
                continue
            file.seek(offset + row * row_bytes)
            file.write(pixels.data)
    return len(paths), reasons
