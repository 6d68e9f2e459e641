from pathlib import Path
from unicodedata import normalize

import pytest

from facegender.data.exclusions import read_exclusions
from facegender.data.labelling_notes import Notes
from facegender.data.raw_manifest import build_manifest
from facegender.errors import UserError
from facegender.files import file_sha256


def exclude(raw: Path, *entries: str) -> tuple[list[str], Notes]:
    notes = Notes()
    manifest = build_manifest(
        raw, female=["female"], male=["male"], ignore=[], exclude=entries, notes=notes
    )
    return list(manifest["path"]), notes


def test_images_are_excluded_by_path_and_by_digest_with_all_copies(make_images) -> None:
    raw = make_images(per_class=3)
    (raw / "male" / "copy.png").write_bytes((raw / "male" / "000.png").read_bytes())
    digest = file_sha256(raw / "male" / "000.png").upper()
    paths, notes = exclude(raw, "female/001.png", digest)
    assert paths == ["female/000.png", "female/002.png", "male/001.png", "male/002.png"]
    assert notes.summary()["excluded"]["count"] == 3
    assert notes.table().to_numpy().tolist() == [
        ["female/001.png", "excluded", "is listed by its path"],
        ["male/000.png", "excluded", "is listed by its SHA-256"],
        ["male/copy.png", "excluded", "is listed by its SHA-256"],
    ]


def test_copies_that_stay_are_named(make_images, caplog: pytest.LogCaptureFixture) -> None:
    raw = make_images(per_class=2)
    (raw / "male" / "copy.png").write_bytes((raw / "male" / "000.png").read_bytes())
    paths, _ = exclude(raw, "male/000.png")
    assert "male/copy.png" in paths
    assert "copies of them stay: 'male/copy.png'" in caplog.text


def test_an_excluded_image_needs_no_label(make_images) -> None:
    raw = make_images(per_class=1)
    (raw / "male" / "000.png").rename(raw / "stray.png")
    (raw / "male" / "b.png").write_bytes(b"b")
    for entry in ("stray.png", file_sha256(raw / "stray.png")):
        assert exclude(raw, entry)[0] == ["female/000.png", "male/b.png"]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_path_matches_in_any_unicode_form(make_images, forms: tuple[str, str]) -> None:
    raw = make_images(per_class=2)
    on_disk, written = (normalize(form, "männer.png") for form in forms)
    (raw / "male" / "001.png").rename(raw / "male" / on_disk)
    paths, notes = exclude(raw, f"male/{written}")
    assert paths == ["female/000.png", "female/001.png", "male/000.png"]
    assert list(notes.excluded) == [f"male/{on_disk}"]


def test_a_path_that_matches_nothing_is_an_error(make_images) -> None:
    with pytest.raises(UserError, match=r"1 path\(s\) that match no image: 'male/000\.jpg'"):
        exclude(make_images(per_class=1), "male/000.jpg", "0" * 64)


def test_a_digest_that_matches_nothing_is_named(
    make_images, caplog: pytest.LogCaptureFixture
) -> None:
    paths, notes = exclude(make_images(per_class=1), "a" * 64)
    assert len(paths) == 2
    assert notes.summary()["excluded"]["digests_without_image"] == ["a" * 64]
    assert "1 SHA-256 that match no image: aaa" in caplog.text


def test_the_list_has_comments_and_line_ends_of_every_kind(tmp_path: Path) -> None:
    source = tmp_path / "exclude.txt"
    source.write_bytes(
        "\ufeff# who asked\r\n # twice\r\n\r\nmale/\u00fc 1.jpg\r\nb.jpg \n".encode()
    )
    assert read_exclusions(source) == ["male/\u00fc 1.jpg", "b.jpg"]
    with pytest.raises(UserError, match=r"Cannot read .*no\.txt, which data\.exclude names"):
        read_exclusions(tmp_path / "no.txt")
