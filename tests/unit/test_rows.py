from pathlib import Path

import numpy as np
import pytest

from facegender.data.decode_rows import decode_rows, write_rows
from facegender.errors import UserError
from facegender.files import file_sha256


def test_rows_are_written_in_place_and_a_cluster_returns_the_same(
    make_images, tmp_path: Path
) -> None:
    images = sorted(make_images(per_class=3).glob("female/*.png"))
    images[1].write_bytes(b"not an image")
    array = tmp_path / "array"
    row_bytes = 8 * 8 * 3
    array.write_bytes(b"\x07" * (100 + 6 * row_bytes))
    tried, reasons = write_rows(images, array, offset=100, first_row=2, size=8)
    assert tried == 3
    assert reasons == {3: "not an image in a known format"}
    content = np.frombuffer(array.read_bytes(), np.uint8)
    assert (content[:100] == 7).all()
    rows = content[100:].reshape(6, row_bytes)
    assert [bool((row == 7).all()) for row in rows] == [True, True, False, True, False, True]
    digests = [file_sha256(path) for path in images]
    first_row, pixels, same_reasons = decode_rows(images, digests, first_row=2, size=8)
    assert (first_row, same_reasons) == (2, reasons)
    assert not pixels[1].any()
    np.testing.assert_array_equal(pixels[::2].reshape(2, -1), rows[2:5:2])


def test_rows_for_a_cluster_are_of_the_files_that_were_labelled(make_images) -> None:
    images = sorted(make_images(per_class=2).glob("female/*.png"))
    digests = [file_sha256(path) for path in images]
    with pytest.raises(UserError, match=r"001\.png: another file is there"):
        decode_rows(images, digests[:1] * 2, first_row=0, size=8)
    images[1].unlink()
    with pytest.raises(UserError, match=r"001\.png: No such file"):
        decode_rows(images, digests, first_row=0, size=8)
