import shutil
import sys
from pathlib import Path

import pytest

from tools.matrix import SET_UPS, main, path_without


def make_programs(folder: Path, *names: str) -> str:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_hidden_programs_alone_are_not_found(tmp_path: Path) -> None:
    one = make_programs(tmp_path / "one", "java", "git")
    two = make_programs(tmp_path / "two", "python")
    (tmp_path / "links").mkdir()
    path = path_without(["java", "chromium"], f"{one}:{two}", tmp_path / "links")
    assert shutil.which("java", path=path) is None
    assert shutil.which("git", path=path) != f"{one}/git"
    assert shutil.which("python", path=path) == f"{two}/python"  # an environment stays in its place


def test_a_set_up_that_fails_is_named(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # the matrix runs this test, too
    program = "import os, sys; print('1 ran'); sys.exit(os.getenv('OMP_NUM_THREADS') == '4')"
    assert main([sys.executable, "-c", program]) == 1
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in table].count("passed") == len(SET_UPS)
    assert [line for line in table if line.startswith("FAILED  4 threads") and "1 ran" in line]
