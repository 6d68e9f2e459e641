import os
import signal
import sys
from pathlib import Path

import joblib
import pytest

from facegender.data import preprocessing
from facegender.data.parallel_tasks import run_tasks
from facegender.data.preprocessing import write_split
from facegender.data.raw_manifest import build_manifest
from facegender.errors import UserError
from tests.conftest import run_python


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
    run_python(code, raw, tmp_path / "part")
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


def _end_at(paths: list, names: list, *, most: int) -> list:
    """Kill this process at a file named `killer`, or at more files than it has the memory for."""
    assert len(names) == len(paths)
    if len(paths) > most or any(path.name == "killer" for path in paths):
        os.kill(os.getpid(), signal.SIGKILL)
    return [path.name for path in paths]


def _chunks(names: list[str], *, most: int) -> list:
    chunks = [names[start : start + 4] for start in range(0, len(names), 4)]
    return [joblib.delayed(_end_at)([*map(Path, chunk)], chunk, most=most) for chunk in chunks]


@pytest.mark.parametrize(
    ("names", "most", "message"),
    [
        ([*"abcde", "killer", *"fghi"], 4, "decodes 'killer' is killed each time.*data.exclude"),
        ([*"abcdefghi"], 3, "no file does this alone: .*memory.*LOKY_MAX_CPU_COUNT=1"),
    ],
)
def test_a_process_that_is_killed_names_its_file_or_memory(
    names: list[str], most: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        list(run_tasks(_chunks(names, most=most), jobs=2))


def test_preprocessing_names_the_file_that_kills_a_process(
    make_images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make_images(per_class=2)
    manifest = build_manifest(raw, female=["female"], male=["male"], ignore=[])
    victim = manifest["path"].iloc[2]

    def write_rows(paths: list[Path], *_: object, **__: object) -> tuple[int, dict]:
        if raw / victim in paths:
            os.kill(os.getpid(), signal.SIGKILL)
        return len(paths), {}

    monkeypatch.setattr(preprocessing, "write_rows", write_rows)
    with pytest.raises(UserError, match=f"{victim}' is killed each time"):
        write_split(manifest, raw, tmp_path / "part", size=32, name="train", jobs=2)
