"""Each image of tests/bad_images.py, wherever images are decoded: each decodes, or has a reason."""

import base64
import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from facegender.cli.main import _run
from facegender.data.decode_rows import write_rows
from facegender.data.fingerprints import take_fingerprints
from facegender.data.images import InvalidImage, UnreadableImage, decode_image, encode_png
from facegender.errors import UserError
from facegender.inference.serving import _to_faces
from tests.bad_images import BAD, GOOD, save, write_jpgs
from tests.conftest import FACEGENDER, WITH_PERMISSIONS, Exported, run_and_measure, run_python

CONTENTS = {name: content for name, (content, _) in BAD.items()}


@pytest.mark.parametrize("name", GOOD)
def test_it_decodes_right(name: str) -> None:
    pixels = decode_image(GOOD[name], 32)
    assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
    assert pixels[:, :12].max() < 20
    assert pixels[:, 20:].min() > 235


def test_resizing_is_antialiased() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = decode_image(encode_png(stripes), 32)
    assert abs(pixels.astype(int) - 128).max() < 16


@pytest.mark.parametrize("name", BAD)
def test_it_has_a_reason(name: str, tmp_path: Path) -> None:
    content, reason = BAD[name]
    with pytest.raises(InvalidImage, match=reason) as of_bytes:
        decode_image(content, 32)
    (path,) = write_jpgs(tmp_path, {name: content})
    with pytest.raises(InvalidImage, match=reason) as of_path:
        decode_image(path, 32)
    assert str(of_path.value) == str(of_bytes.value)
    assert "\n" not in str(of_path.value)
    assert str(tmp_path) not in str(of_path.value)


def test_reasons_are_the_same_before_any_heic_was_read() -> None:
    code = (
        "from facegender.data.images import InvalidImage, decode_image\n"
        "try: decode_image(b'?', 32)\n"
        "except InvalidImage as error: print(error)\n"
    )
    done = run_python(code)
    assert (done.stdout, done.stderr) == ("not an image in a known format\n", "")


def test_one_pixel_decodes_here_and_is_too_small_for_the_data_checks(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), "red").save(tmp_path / "a.png")
    assert (decode_image(tmp_path / "a.png", 32) == (255, 0, 0)).all()
    _, measures, _, reasons = take_fingerprints([tmp_path / "a.png"])
    assert (measures.tolist(), reasons) == ([[1, 1, 0]], {})


def test_split_decodes_and_refuses_the_same(tmp_path: Path) -> None:
    *_, reasons = take_fingerprints(write_jpgs(tmp_path, GOOD | CONTENTS), first_row=7)
    assert list(reasons) == [7 + len(GOOD) + index for index in range(len(BAD))]


def test_preprocess_decodes_and_refuses_the_same(tmp_path: Path) -> None:
    paths = write_jpgs(tmp_path, GOOD | CONTENTS)
    (tmp_path / "array").write_bytes(bytes(len(paths) * 32 * 32 * 3))
    done, reasons = write_rows(paths, tmp_path / "array", offset=0, first_row=0, size=32)
    assert done == len(paths)
    assert sorted(reasons) == list(range(len(GOOD), len(paths)))
    written = np.fromfile(tmp_path / "array", np.uint8).reshape(-1, 32, 32, 3)
    assert (written[: len(GOOD), :, 20:] > 235).all()
    assert not written[len(GOOD) :].any()


def test_the_server_decodes_and_refuses_the_same() -> None:
    for content in GOOD.values():
        for item in (content, base64.b64encode(content).decode()):
            np.testing.assert_array_equal(
                _to_faces(item, 32, None, 0)[0][1], decode_image(content, 32)
            )
    for name, (content, reason) in BAD.items():
        for item in (content, base64.b64encode(content).decode()):
            with pytest.raises(MlflowException, match=f"Image 7: .*({reason})") as caught:
                _to_faces(item, 32, None, 7)
            assert caught.value.error_code == "INVALID_PARAMETER_VALUE", name


def test_predict_decodes_and_refuses_the_same(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_jpgs(tmp_path, GOOD | CONTENTS)
    assert _run(["predict", "--json", "--model", str(exported.float32), str(tmp_path)]) == 1
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    failed = {Path(answer["image"]).stem for answer in answers if answer["error"]}
    assert len(answers) == len(GOOD) + len(BAD)
    assert failed == set(BAD)


@pytest.fixture
def odd(tmp_path: Path) -> dict[str, Path]:
    """Things that are named like images and are no files."""
    names = ("pipe", "folder", "nowhere", "itself", "device")
    paths = {name: tmp_path / f"{name}.jpg" for name in names}
    os.mkfifo(paths["pipe"])
    paths["folder"].mkdir()
    paths["nowhere"].symlink_to("missing.jpg")
    paths["itself"].symlink_to("itself.jpg")
    paths["device"].symlink_to("/dev/zero")
    return paths


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pipe", "not a plain file"),
        ("folder", "not a plain file"),
        ("device", "not a plain file"),
        ("nowhere", "no such file"),
        ("itself", "Too many levels of symbolic links"),
    ],
)
def test_what_is_no_file_has_a_reason_at_once(odd: dict[str, Path], name: str, reason: str) -> None:
    with pytest.raises(InvalidImage, match=reason) as caught:
        decode_image(odd[name], 32)
    assert str(odd[name]) not in str(caught.value)


@pytest.mark.timeout(120)
def test_predict_names_what_is_no_file(
    odd: dict[str, Path], exported: Exported, capsys: pytest.CaptureFixture
) -> None:
    model = ["--model", str(exported.float32)]
    assert _run(["predict", *model, str(odd["pipe"]), str(odd["device"])]) == 1
    assert capsys.readouterr().err.count("not a plain file") == 2
    for name in ("nowhere", "itself"):
        with pytest.raises(UserError, match=rf"no file or folder .*{name}\.jpg"):
            _run(["predict", *model, str(odd[name])])
    # A folder is searched; none of the others is waited for.
    with pytest.raises(UserError, match="no image in the folder"):
        _run(["predict", *model, str(odd["folder"].parent)])


def test_permissions_of_the_disk_do_the_same(tmp_path: Path) -> None:
    (path,) = write_jpgs(tmp_path, {"a": GOOD["jpeg"]})
    path.chmod(0)
    code = (
        "import sys; from pathlib import Path\n"
        "from facegender.data.images import decode_image\n"
        "decode_image(Path(sys.argv[1]), 32)\n"
    )
    done = run_python(code, path, prefix=WITH_PERMISSIONS, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("UnreadableImage: Permission denied\n")


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Exception]], Path]:
    """Return a function that makes a good image's reads or decodings fail in turn."""

    def fail(errors: list[Exception]) -> Path:
        (path,) = write_jpgs(tmp_path, {"a": GOOD["jpeg"]})
        monkeypatch.setattr("facegender.data.images._PAUSES", (0, 0, 0))
        memory = isinstance(errors[0], MemoryError)
        owner, name = (PIL.Image, "open") if memory else (Path, "read_bytes")
        original = getattr(owner, name)

        def stand_in(*args: object, **kwargs: object) -> object:
            if errors:
                raise errors.pop()
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, stand_in)
        return path

    return fail


FAULTS = [OSError(errno.EIO, "I/O error"), OSError(errno.ESTALE, "Stale handle"), MemoryError()]


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_a_fault_that_passes_costs_no_image(failing: Callable, fault: Exception) -> None:
    path = failing([fault] * 3)
    np.testing.assert_array_equal(decode_image(path, 32), decode_image(GOOD["jpeg"], 32))


@pytest.mark.parametrize("stage", ["split", "preprocess"])
@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_a_fault_that_lasts_fails_the_stage(
    failing: Callable, fault: Exception, stage: str, tmp_path: Path
) -> None:
    path = failing([fault] * 10)
    (tmp_path / "array").touch()
    run = {
        "split": lambda: take_fingerprints([path]),
        "preprocess": lambda: write_rows(
            [path], tmp_path / "array", offset=0, first_row=0, size=32
        ),
    }[stage]
    with pytest.raises(UserError, match=r"a\.jpg.*cannot be read: (I/O|Stale|not enough)"):
        run()


def test_a_file_of_which_a_part_is_read_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = write_jpgs(tmp_path, {"a": GOOD["jpeg"]})
    monkeypatch.setattr("facegender.data.images._PAUSES", ())
    monkeypatch.setattr(Path, "read_bytes", lambda _: GOOD["jpeg"][:300])
    with pytest.raises(UnreadableImage, match="300 of its"):
        decode_image(path, 32)


def test_a_jpeg_that_lacks_pixels_is_not_taken_for_one_that_lacks_its_end() -> None:
    # Noise to the last pixel, so that each cut loses some.
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    jpeg = save(Image.fromarray(noise), "JPEG", quality=95)
    np.testing.assert_array_equal(decode_image(jpeg[:-2], 32), decode_image(jpeg, 32))
    for cut in (12, 40, 100, len(jpeg) // 2):
        with pytest.raises(InvalidImage, match="truncated"):
            decode_image(jpeg[:-cut], 32)


NAMES = [
    "größe 顔.JPG",
    "new\nline.jpeg",
    "a b  c.Png",
    "tab\tand\r.png",
    "q'\"$(x);&.jpg",
    "-x.jpg",
    # A quote before `=`, as for spreadsheets, would make it the name of no file.
    "=cmd|\x1b]0;owned\x07\x1b[2J\r\n\u202egnp.png",
]


@pytest.mark.parametrize("form", ["text", "csv", "json"])
def test_predict_prints_names_of_every_kind(exported: Exported, tmp_path: Path, form: str) -> None:
    import csv

    names = [*map(os.fsencode, NAMES), b"\xff\xe9.jpg"]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(GOOD["jpeg"])
    flags = [] if form == "text" else [f"--{form}"]
    command = ("predict", "--model", exported.float32, *flags, tmp_path)
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = run_python(FACEGENDER, *command, text=False, env=environment)
    printed = done.stdout.decode(errors="surrogateescape")
    assert form == "csv" or printed.replace("\n", "").isprintable()
    if form == "text":
        assert len(printed.splitlines()) == len(names)
        assert r"new\nline.jpeg" in printed
        assert r"\udcff\udce9.jpg" in printed
        return
    if form == "csv":
        answers = [row["image"] for row in csv.DictReader(printed.splitlines(keepends=True))]
    else:
        answers = [json.loads(line)["image"] for line in printed.splitlines()]
    assert {os.fsencode(Path(name).name) for name in answers} == set(names)


def test_standard_input_without_an_end_is_refused(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("facegender.cli.predict.MAX_STDIN_BYTES", 1000)
    with Path("/dev/zero").open() as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        with pytest.raises(UserError, match="more than 1,000 bytes"):
            _run(["predict", "--model", str(exported.float32), "-"])


def decoded(path: Path) -> tuple[str, float]:
    """Decode a file in a process of its own; return what came of it, and the megabytes it took."""
    return run_and_measure(
        "from facegender.data.images import InvalidImage, decode_image\n"
        "try: print(decode_image(path, 96).shape)\n"
        "except InvalidImage as error: print(error)\n",
        path,
    )


@pytest.mark.parametrize("name", ["bomb", "bomb-within-pillows-limit", "text-bomb", "profile-bomb"])
def test_a_bomb_takes_no_memory(tmp_path: Path, name: str) -> None:
    (path,) = write_jpgs(tmp_path, {name: BAD[name][0]})
    what, megabytes = decoded(path)
    assert "too large" in what
    # Python, NumPy and Pillow take about 40 of them; the texts may unpack to 64.
    assert megabytes < 250


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16"])
def test_the_largest_picture_that_is_decoded_takes_less_than_a_gigabyte(
    tmp_path: Path, mode: str
) -> None:
    Image.new(mode, (10_000, 9_900)).save(tmp_path / "large.png")
    what, megabytes = decoded(tmp_path / "large.png")
    assert what == "(96, 96, 3)"
    assert megabytes < 1000
