import subprocess
import sys
from pathlib import Path

import numpy as np

from facegender.rows import write_rows


def test_rows_are_written_in_place_and_failures_by_row(make_images, tmp_path: Path) -> None:
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


def test_processes_do_not_import_pandas() -> None:
    code = "import sys, facegender.rows; sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
