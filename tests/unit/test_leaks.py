"""The searches of tests/leaks.py find what is there: else the tests that use them prove nothing."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import commit_all, init_repository
from tests.leaks import contents, holding, is_pickle


def test_words_are_found_wherever_they_are(tmp_path: Path) -> None:
    inner, outer = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("deep.txt", "x" * 99 + "canary")
    with zipfile.ZipFile(outer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner.zip", inner.getvalue())
    (tmp_path / "outer.keras").write_bytes(outer.getvalue())
    (tmp_path / ".hidden").write_bytes(b"\0\xffcanary\0")
    (tmp_path / "canary").mkdir()
    (tmp_path / "canary" / "empty").touch()
    (tmp_path / "clean").write_text("nothing")
    (tmp_path / "link").symlink_to("/nowhere/canary")
    repository = tmp_path / "repository"
    repository.mkdir()
    init_repository(repository)
    (repository / "file").write_text("canary")
    commit_all(repository)
    (repository / "file").unlink()
    assert holding(tmp_path, ["absent", "canary"]) == [
        ".hidden",
        "canary/empty",
        "link",
        "outer.keras/inner.zip/deep.txt",
        "repository/.git objects",
    ]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_found(protocol: int) -> None:
    assert is_pickle("model.bin", pickle.dumps({"a": print}, protocol))


def test_an_array_of_objects_is_found(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", good=np.arange(3), bad=np.array([print]))
    found = [name for name, content in contents(tmp_path) if is_pickle(name, content)]
    assert found == ["a.npz/bad.npy"]


@pytest.mark.parametrize("name", ["a.pkl", "a.joblib"])
def test_the_name_of_a_pickle_is_enough(name: str) -> None:
    assert is_pickle(name, b"")


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"\x80\x04 no", b"\x89PNG", b"text", b"\x80\x60."]
)
def test_what_is_none_is_passed_over(content: bytes) -> None:
    assert not is_pickle("file", content)
