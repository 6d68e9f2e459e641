import subprocess
import sys
from pathlib import Path

import pytest

from facegender.data.preprocessing import write_split
from facegender.data.raw_manifest import build_manifest
from facegender.errors import UserError


def test_nothing_of_dask_is_imported_by_default(make_images, tmp_path: Path) -> None:
    raw = make_images(per_class=70)
    code = (
        "import sys; from pathlib import Path\n"
        "from facegender.data.raw_manifest import build_manifest\n"
        "from facegender.data.preprocessing import write_split\n"
        "raw, target = map(Path, sys.argv[1:])\n"
        "manifest = build_manifest(raw, female=['female'], male=['male'], ignore=[])\n"
        "write_split(manifest, raw, target, size=32, name='train', jobs=2)\n"
        "sys.exit(', '.join({'dask', 'distributed'} & set(sys.modules)) or 0)\n"
    )
    command = [sys.executable, "-c", code, raw, tmp_path / "part"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "part" / "index.csv").is_file()


def test_a_cluster_without_its_packages_is_a_clear_error(
    make_images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "facegender.data.dask_cluster", raising=False)
    raw = make_images(per_class=2)
    manifest = build_manifest(raw, female=["female"], male=["male"], ignore=[])
    with pytest.raises(UserError, match="make install-scale"):
        write_split(
            manifest, raw, tmp_path / "part", size=32, name="train", scheduler="tcp://127.0.0.1:1"
        )
