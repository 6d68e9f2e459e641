"""The decoder and the guard of archives, against damage and malice that hypothesis makes up.

Bounded and the same every time in `make test`; `make fuzz` goes on for longer, with new chance.
"""

import io
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from facegender.data import images
from facegender.data.images import InvalidImage, decode_image
from facegender.data.sources import archive as archives
from facegender.data.sources.archive import ArchiveLimits, extract_archive
from facegender.errors import UserError
from tests.bad_images import BAD, GOOD, halves, save

IMAGES = [
    *GOOD.values(),
    *(content for name, (content, _) in BAD.items() if "bomb" not in name),
    *(save(halves(), "TIFF", compression=name) for name in ("tiff_lzw", "jpeg", "packbits")),
]
LIMITS = ArchiveLimits(max_total_bytes=10**6, max_ratio=100, max_files=100)


@st.composite
def damaged(draw: Callable, contents: list[bytes]) -> bytes:
    """One of the contents with bytes overwritten, removed, repeated, or those of another."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 6))):
        # Formats keep what matters in front.
        place = draw(st.integers(0, min(len(content), 200)) | st.integers(0, len(content)))
        match draw(st.sampled_from(["overwrite", "remove", "repeat", "cut", "splice"])):
            case "overwrite":
                new = draw(st.binary(min_size=1, max_size=8))
                content[place : place + len(new)] = new
            case "remove":
                del content[place : place + draw(st.integers(1, 64))]
            case "repeat":
                content[place:place] = content[place : place + draw(st.integers(1, 64))]
            case "cut":
                del content[place:]
            case "splice":
                content[place:] = draw(st.sampled_from(contents))[place:]
    return bytes(content)


@pytest.mark.timeout(600)
@given(damaged(IMAGES) | st.binary(max_size=200))
def test_the_decoder_gives_pixels_or_a_reason(content: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # Damage may declare a large picture, which would be decoded, and only takes time.
        patch.setattr(images, "MAX_PIXELS", 2_000_000)
        warnings.simplefilter("ignore")
        try:
            pixels = decode_image(content, 32)
        except InvalidImage as error:
            reason = str(error)
        else:
            reason = ""
    if reason:
        assert len(reason.splitlines()) == 1
        return
    assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)


@given(
    st.sampled_from(["L", "LA", "RGB", "RGBA", "P", "CMYK", "1", "I;16", "F", "YCbCr", "LAB"]),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(0, 9),
)
def test_any_mode_size_and_orientation_decodes(
    mode: str, width: int, height: int, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = save(Image.new(mode, (width, height)), "TIFF", exif=exif)
    pixels, *sides = images.measure_image(content, 16)
    assert pixels.shape == (16, 16, 3)
    assert sorted(sides) == sorted((width, height))


def make_archive(kind: str, members: list[tuple[str, bytes, str]]) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, content, type_ in members:
                info = zipfile.ZipInfo("x")
                info.filename = name
                modes = {"file": 0o100644, "link": 0o120777, "device": 0o020666, "fifo": 0o010644}
                info.external_attr = modes.get(type_, 0o100644) << 16
                zipped.writestr(info, content)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode=f"w:{kind.partition('.')[2]}") as tar:
        for name, content, type_ in members:
            info = tarfile.TarInfo(name)
            kinds = {"link": tarfile.SYMTYPE, "device": tarfile.CHRTYPE, "fifo": tarfile.FIFOTYPE}
            info.type = kinds.get(type_, tarfile.REGTYPE)
            info.linkname = content.decode("latin-1")[:50] if type_ == "link" else ""
            info.size = len(content) if type_ == "file" else 0
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


KINDS = st.sampled_from(["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
PIECES = st.sampled_from(["..", ".", "", "a", "b.jpg", "c:", "~", "female", "/", "\\", "é", "…"])
NAMES = st.lists(PIECES, min_size=1, max_size=5).map("/".join) | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20
)
MEMBERS = st.lists(
    st.tuples(
        NAMES,
        st.binary(max_size=300) | st.just(bytes(5000)),
        st.sampled_from(["file", "file", "file", "file", "link", "device", "fifo"]),
    ),
    max_size=6,
)


def unpack(content: bytes, members: list[tuple[str, bytes, str]] | None = None) -> None:
    """Unpack, and see that everything or nothing is there, in the target and nowhere else."""
    with TemporaryDirectory() as folder:
        archive, target = Path(folder) / "faces", Path(folder) / "in" / "target"
        archive.write_bytes(content)
        try:
            extract_archive(archive, target, LIMITS)
            reason = ""
        except UserError as error:
            reason = str(error)
        assert len(reason.splitlines()) <= 1
        found = [path for path in (Path(folder) / "in").rglob("*") if path != target]
        assert all(path.is_relative_to(target) for path in found)
        assert set(Path(folder).iterdir()) == {archive, Path(folder) / "in"}
        if reason:
            assert found == []
            return
        assert not any(path.is_symlink() for path in found)
        files = sorted(path.read_bytes() for path in found if path.is_file())
        assert sum(map(len, files)) <= LIMITS.max_total_bytes
        if members is not None:
            # A member whose name is a folder's has no content.
            assert all(kind == "file" for _, _, kind in members)
            named = [c for name, c, _ in members if not name.endswith(("/", "\\"))]
            assert all(content in files for content in named)
            assert len(files) <= len(members)


@pytest.mark.timeout(600)
@given(KINDS, MEMBERS)
def test_the_guard_unpacks_all_in_the_target_or_nothing(
    kind: str, members: list[tuple[str, bytes, str]]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of duplicate names
        content = make_archive(kind, members)
    unpack(content, members)


SOUND = [
    make_archive(
        kind, [("female/a.jpg", bytes(range(256)), "file"), ("m/b.jpg", b"b" * 999, "file")]
    )
    for kind in ("zip", "tar", "tar.gz", "tar.bz2", "tar.xz")
]


@pytest.mark.timeout(600)
@given(damaged(SOUND))
def test_a_damaged_archive_is_refused_or_harmless(content: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, "_MAX_HEADER_BYTES", 1 << 20)
        unpack(content)
