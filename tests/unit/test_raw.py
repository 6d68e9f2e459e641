import os
import signal
from pathlib import Path

import pytest

from facegender.data.sources.raw_directory import content_digest, replace_directory
from tests import conftest
from tests.conftest import fill, run_python


def read(folder: Path) -> dict[str, str]:
    """Return the texts of a folder's files."""
    return {name: content.decode() for name, content in conftest.read(folder).items()}


def test_digest_covers_names_and_bytes_only(tmp_path):
    first = fill(tmp_path / "first", {"b/x.jpg": "1", "a.csv": "2"})
    second = fill(tmp_path / "second", {"a.csv": "2", "b/x.jpg": "1"})
    os.utime(second / "a.csv", (0, 0))
    (second / "a.csv").chmod(0o600)
    (second / "empty").mkdir()
    assert content_digest(first) == content_digest(second)
    assert content_digest(first)[0] == 2


@pytest.mark.parametrize(
    "other",
    [
        {"b/x.jpg": "1", "a.csv": "3"},
        {"b/x.jpg": "1", "a.cs": "2"},
        {"x.jpg": "1", "a.csv": "2"},
        {"b/x.jpg": "1"},
        {"b/x.jpg": "2", "a.csv": "1"},
    ],
)
def test_digest_tells_any_change(tmp_path, other):
    first = fill(tmp_path / "first", {"b/x.jpg": "1", "a.csv": "2"})
    assert content_digest(first)[1] != content_digest(fill(tmp_path / "other", other))[1]


def test_digest_does_not_follow_links(tmp_path):
    directory = fill(tmp_path / "data", {"a.jpg": "1"})
    before = content_digest(directory)
    fill(tmp_path / "outside", {"b.jpg": "2"})
    (directory / "link").symlink_to(tmp_path / "outside")
    (directory / "c.jpg").symlink_to(tmp_path / "outside" / "b.jpg")
    assert content_digest(directory) == before


def test_success_replaces_what_was_there(tmp_path):
    target = fill(tmp_path / "data" / "raw", {"old.jpg": "old"})
    with replace_directory(target) as temporary:
        assert temporary.parent == target.parent
        assert read(target) == {"old.jpg": "old"}
        fill(temporary, {"new.jpg": "new"})
    assert read(target) == {"new.jpg": "new"}
    assert list(target.parent.iterdir()) == [target]


def test_the_target_and_its_parents_need_not_exist(tmp_path):
    with replace_directory(tmp_path / "data" / "raw") as temporary:
        fill(temporary, {"new.jpg": "new"})
    assert read(tmp_path / "data" / "raw") == {"new.jpg": "new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_changes_nothing(tmp_path, error):
    target = fill(tmp_path / "raw", {"old.jpg": "old"})
    with pytest.raises(error), replace_directory(target) as temporary:  # noqa: PT012
        fill(temporary, {"new.jpg": "half"})
        raise error
    assert read(tmp_path) == {"raw/old.jpg": "old"}


def test_what_a_killed_run_left_is_cleared(tmp_path):
    target = fill(tmp_path / "raw", {"old.jpg": "old"})
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from facegender.data.sources.raw_directory import replace_directory\n"
        "with replace_directory(Path(sys.argv[1])) as temporary:\n"
        "    (temporary / 'half.jpg').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert run_python(script, target, check=False).returncode == -signal.SIGKILL
    assert read(target) == {"old.jpg": "old"}
    assert (tmp_path / ".raw.partial" / "half.jpg").exists()
    with replace_directory(target) as temporary:
        assert read(temporary) == {}
        fill(temporary, {"new.jpg": "new"})
    assert read(tmp_path) == {"raw/new.jpg": "new"}


def test_a_link_is_replaced_and_what_it_leads_to_is_kept(tmp_path):
    album = fill(tmp_path / "album", {"photo.jpg": "mine"})
    target = tmp_path / "data" / "raw"
    target.parent.mkdir()
    target.symlink_to(album)
    with replace_directory(target) as temporary:
        fill(temporary, {"new.jpg": "new"})
    assert read(album) == {"photo.jpg": "mine"}
    assert not target.is_symlink()
    assert read(target) == {"new.jpg": "new"}
