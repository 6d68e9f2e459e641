import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from facegender.cli.main import COMMANDS, _run
from facegender.data.images import encode_png
from facegender.errors import UserError
from facegender.inference.export import MAX_FLOAT_DIFFERENCE
from facegender.inference.litert import probe_litert
from facegender.inference.threshold import read_threshold, write_threshold
from tests.conftest import FACEGENDER, WITH_PERMISSIONS, Exported, run_command, run_python
from tools.compose_params import ROOT


@pytest.fixture
def folder(exported: Exported, tmp_path: Path) -> Path:
    """The exported model's 64 images as files whose names sort in their order."""
    (tmp_path / "faces").mkdir()
    for number, image in enumerate(exported.images):
        (tmp_path / "faces" / f"{number:02}.png").write_bytes(encode_png(image))
    return tmp_path / "faces"


def predict(model: Path, *words: object) -> int:
    return _run(["predict", "--model", str(model), *(str(word) for word in words)])


def test_a_folder_in_order_as_json(
    exported: Exported, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert predict(exported.float32, "--json", folder) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(item["image"]).name for item in answers] == [f"{n:02}.png" for n in range(64)]
    said = [item["probability"] for item in answers]
    np.testing.assert_allclose(said, exported.probabilities, atol=MAX_FLOAT_DIFFERENCE, rtol=0)
    names = ["male" if p >= 0.5 else "female" for p in exported.probabilities]
    assert [item["label"] for item in answers] == names


@pytest.mark.parametrize("form", ["text", "json", "csv"])
def test_it_abstains_when_asked(
    exported: Exported, folder: Path, capsys: pytest.CaptureFixture, form: str
) -> None:
    flags = [] if form == "text" else [f"--{form}"]
    predict(exported.float32, *flags, "--abstain-below", "0.8", folder)
    lines = capsys.readouterr().out.splitlines()
    if form == "text":
        labels = [line.split()[0] for line in lines]
    elif form == "json":
        labels = [json.loads(line)["label"] for line in lines]
    else:
        labels = [row["label"] for row in csv.DictReader(lines)]
    sure = np.maximum(exported.probabilities, 1 - exported.probabilities) >= 0.8
    assert 0 < sure.sum() < 64
    assert [label != "uncertain" for label in labels] == sure.tolist()
    assert set(labels) == {"female", "male", "uncertain"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--abstain-below", value) for value in ("-0.1", "1.1", "nan", "much")),
        *(("--threshold", value) for value in ("-0.1", "50", "nan")),
    ],
)
def test_a_probability_out_of_range_is_refused(
    folder: Path, capsys: pytest.CaptureFixture, option: str, value: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        _run(["predict", option, value, str(folder)])
    assert f"{value} is not between 0 and 1" in capsys.readouterr().err


def test_the_threshold_is_that_of_the_model_unless_named(
    exported: Exported, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = tmp_path / "model.tflite"
    content = exported.float32.read_bytes()
    plain = content[: content.index(b"PK\3\4", 20)]
    for threshold, flags in ((0.2, []), (0.8, []), (0.2, ["--threshold", "0.8"])):
        model.write_bytes(plain)
        write_threshold(model, threshold)
        predict(model, "--json", *flags, folder)
        captured = capsys.readouterr()
        answers = [json.loads(line) for line in captured.out.splitlines()]
        asked = float(flags[1]) if flags else threshold
        assert 0 < sum(item["label"] == "male" for item in answers) < 64
        assert all((item["label"] == "male") == (item["probability"] >= asked) for item in answers)
        assert captured.err == ""
    model.write_bytes(plain)
    predict(model, folder / "00.png")
    assert "model.tflite stores no threshold; using 0.5" in capsys.readouterr().err
    model.write_bytes(b"")
    write_threshold(model, 50)
    with pytest.raises(UserError, match="not a probability between 0 and 1"):
        read_threshold(model)


def test_a_keras_model_prints_no_notes_of_tensorflow(exported: Exported, folder: Path) -> None:
    done = run_python(FACEGENDER, "predict", "--model", exported.keras, folder / "00.png")
    assert done.stderr == f"{exported.keras.name} stores no threshold; using 0.5\n"


def test_a_model_of_the_sample_says_so_and_another_does_not(
    exported: Exported,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "models").mkdir()
    shutil.copy(exported.float32, tmp_path / "models/model.tflite")
    write_threshold(tmp_path / "models/model.tflite", 0.5)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr("facegender.cli.predict.project_root", lambda: tmp_path)
    for info, said in (("sample", True), ("kaggle", False), (None, False)):
        (tmp_path / "data/raw.json").write_text(json.dumps({"source": info} if info else []))
        assert _run(["predict", str(folder / "00.png")]) == 0
        assert ("cartoons" in capsys.readouterr().err) == said
    predict(tmp_path / "models/model.tflite", folder / "00.png")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("path", "said"), [("data/raw", True), ("facegender/files.py", False)])
def test_a_model_that_has_not_seen_the_data_says_so(
    exported: Exported,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    *,
    path: str,
    said: bool,
) -> None:
    """The pipeline stopped between download and split, as at a folder of unknown class."""
    (tmp_path / "models").mkdir()
    shutil.copy(exported.float32, tmp_path / "models/model.tflite")
    write_threshold(tmp_path / "models/model.tflite", 0.5)
    monkeypatch.setattr("facegender.cli.predict.project_root", lambda: tmp_path)
    for digest in ("old", "new"):
        (tmp_path / "dvc.lock").write_text(
            "schema: '2.0'\nstages:\n  download:\n    outs:\n"
            f"    - path: {path}\n      hash: md5\n      md5: new.dir\n      size: 7\n"
            "  split:\n    deps:\n"
            f"    - path: {path}\n      hash: md5\n      md5: {digest}.dir\n      size: 7\n"
        )
        assert _run(["predict", str(folder / "00.png")]) == 0
        note = "note: model.tflite comes from an earlier run: `dvc repro`"
        assert (note in capsys.readouterr().err) == (said and digest == "old")


def in_shell(line: str, model: Path, folder: Path) -> subprocess.CompletedProcess:
    """Run a line of bash in which PREDICT is the command with a model."""
    predict = f"{sys.executable} -c '{FACEGENDER}' predict --model {model}"
    script = f"set -o pipefail; cd {folder}; {line.replace('PREDICT', predict)}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return run_command("bash", "-c", script, env=environment, check=False)


def test_streams_may_be_closed(exported: Exported, folder: Path) -> None:
    done = in_shell("PREDICT . | sed q", exported.float32, folder)
    assert (done.returncode, done.stderr) in {(0, ""), (141, "")}  # by who is faster
    assert done.stdout.endswith("00.png\n")
    done = in_shell("PREDICT 00.png > >(:); echo $?", exported.float32, folder)
    assert done.stderr == ""
    done = in_shell("PREDICT 00.png 2>&-", exported.float32, folder)
    assert (done.returncode, done.stdout[-7:]) == (0, "00.png\n")
    done = in_shell("PREDICT 00.png >&-", exported.float32, folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = in_shell("PREDICT - <&-", exported.float32, folder)
    assert (done.returncode, done.stderr) == (1, "-: not an image: the file is empty\n")


@pytest.mark.parametrize(("flag", "written"), [("", r"J\xf6rg.png"), ("--csv", "Jörg.png")])
def test_names_that_the_terminal_cannot_show_are_escaped(
    exported: Exported, folder: Path, flag: str, written: str
) -> None:
    (folder / "00.png").rename(folder / "Jörg.png")
    done = in_shell(f"PYTHONIOENCODING=ascii PREDICT {flag} *rg.png", exported.float32, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert written in done.stdout


def test_a_broken_file_is_named_and_the_others_are_answered(
    exported: Exported, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder / "01.png").write_bytes(b"?")
    assert predict(exported.float32, *sorted(folder.iterdir())[:3]) == 1
    captured = capsys.readouterr()
    assert [Path(line.split()[-1]).name for line in captured.out.splitlines()] == [
        "00.png",
        "02.png",
    ]
    assert captured.err == f"{folder / '01.png'}: not an image in a known format\n"


def test_what_a_folder_has_besides_images_is_counted(
    exported: Exported,
    folder: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("film.mov", "raw.cr2", ".hidden", "faces.csv"):
        (folder / name).write_bytes(b"II*\0")
    (folder / "lost.jpg").symlink_to("nowhere")
    (folder.parent / "more").mkdir()
    (folder / "linked").symlink_to(folder.parent / "more")
    assert predict(exported.float32, folder) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 64
    assert captured.err.startswith(f"skipped 5 in {folder}, not image files: 'faces.csv', ")
    for name in ("film.mov", "linked", "lost.jpg", "raw.cr2"):
        assert f"'{name}'" in captured.err
    (folder.parent / "more" / "notes.txt").touch()
    monkeypatch.chdir(folder.parent / "more")
    with pytest.raises(UserError, match=r"no image in the folder \. \(skipped 1 in \., not"):
        predict(exported.float32, ".")


def test_what_may_not_be_read_is_named_and_the_rest_is_answered(
    exported: Exported, folder: Path
) -> None:
    for name, mode in (("closed", 0), ("listed", 0o444)):
        (folder / name).mkdir()
        shutil.copy(folder / "00.png", folder / name / "00.png")
        (folder / name).chmod(mode)
    words = ["predict", "--json", "--model", exported.float32, folder, folder / "closed" / "00.png"]
    done = run_python(FACEGENDER, *words, prefix=WITH_PERMISSIONS, check=False)
    for name in ("closed", "listed"):
        (folder / name).chmod(0o755)
    assert (done.returncode, done.stderr) == (1, f"{folder / 'closed'}: Permission denied\n")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    failed = {answer["image"]: answer["error"] for answer in answers if answer["error"]}
    names = (folder / "listed" / "00.png", folder / "closed" / "00.png")
    assert failed == dict.fromkeys(map(str, names), "Permission denied")
    assert len(answers) == 64 + 2


@pytest.mark.parametrize("name", ["", "x" * 300, "a.png/x"])
def test_a_name_of_nothing_is_not_searched(exported: Exported, folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="There is no file or folder"):
        predict(exported.float32, name)


@pytest.mark.parametrize("form", ["text", "json", "csv"])
def test_what_is_missing_does_not_stop_the_others(
    exported: Exported, folder: Path, capsys: pytest.CaptureFixture, form: str
) -> None:
    (folder / "empty").mkdir()
    (folder / "link.png").symlink_to("nowhere")
    asked = [folder / name for name in ("gone.png", "00.png", "empty", "link.png", "01.png")]
    flags = [] if form == "text" else [f"--{form}"]
    assert predict(exported.float32, *flags, *asked) == 1
    out, err = capsys.readouterr()
    assert f"{folder / 'empty'}: no image in this folder\n" in err
    missing = [str(folder / name) for name in ("gone.png", "link.png")]
    if form == "text":
        assert [line.split("/")[-1] for line in out.splitlines()] == ["00.png", "01.png"]
        assert all(f"{name}: no such file\n" in err for name in missing)
        return
    lines = out.splitlines()
    answers = list(csv.DictReader(lines)) if form == "csv" else [json.loads(line) for line in lines]
    assert [row["image"] for row in answers if row["error"] == "no such file"] == missing
    assert len(answers) == 4
    with pytest.raises(UserError, match=r"There is no file or folder .*gone\.png"):
        predict(exported.float32, asked[0], folder / "empty")


ESCAPES = "=cmd|\x1b]0;owned\x07\x1b[2J\r\n\u202egnp.png"


def test_names_cannot_play_with_the_terminal(
    exported: Exported, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder / "00.png").rename(folder / ESCAPES)
    (folder / f"broken{ESCAPES}").write_bytes(b"?")
    predict(exported.float32, folder / ESCAPES, folder / f"broken{ESCAPES}")
    captured = capsys.readouterr()
    shown = r"=cmd|\x1b]0;owned\x07\x1b[2J\r\n\u202egnp.png"
    assert captured.out.endswith(f"/{shown}\n")
    assert f"/broken{shown}: " in captured.err
    for text in (captured.out, captured.err):
        assert text.removesuffix("\n").isprintable()


def test_another_ending_is_a_clear_error(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.h5 is neither"):
        predict(Path("model.h5"), folder)


@pytest.mark.parametrize(("terminal", "count", "bar"), [(1, 64, 1), (1, 3, 0), (0, 64, 0)])
def test_a_bar_for_many_images_on_a_terminal(
    exported: Exported,
    folder: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    terminal: int,
    count: int,
    bar: int,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bool(terminal))
    predict(exported.float32, "--json", *sorted(folder.iterdir())[:count])
    captured = capsys.readouterr()
    assert ("/64" in captured.err) == bool(bar)
    assert [json.loads(line)["error"] for line in captured.out.splitlines()] == [None] * count


# A sound file of LiteRT's format, version 3, that has nothing in it, not even lists.
HOLLOW_MODEL = bytes.fromhex("1000000054464c3300000600080004000600000003000000")


def test_a_model_made_to_end_the_process_is_a_clear_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hollow.tflite").write_bytes(HOLLOW_MODEL)
    load = (
        "import sys, pathlib; from facegender.inference.litert import load_litert;"
        "load_litert(pathlib.Path(sys.argv[1]))"
    )
    hollow = tmp_path / "hollow.tflite"
    done = run_python(load, hollow, check=False)
    assert done.returncode < 0, "the runtime has been mended"
    done = run_python(FACEGENDER, "predict", "--model", hollow, folder, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: The model hollow.tflite is damaged or malicious")
    assert len(done.stderr.splitlines()) == 1


def test_a_probe_that_does_not_end_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.tflite")
    monkeypatch.setattr("facegender.inference.litert._PROBE_SECONDS", 1)
    with pytest.raises(UserError, match="does not finish within 1 seconds"):
        probe_litert(tmp_path / "pipe.tflite")


@pytest.mark.parametrize("damage", [b"", b"?", bytes(3000), b"\x1c\0\0\0TFL3" + bytes(4096)])
def test_a_damaged_model_is_one_paragraph(folder: Path, tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "model.tflite").write_bytes(damage)
    with pytest.raises(UserError, match=r"model\.tflite is damaged") as caught:
        predict(tmp_path / "model.tflite", folder)
    assert "\n" not in str(caught.value)


def imported(*words: object) -> set[str]:
    """Return the heavy packages that a command imports."""
    code = f"import atexit, sys; atexit.register(lambda: print(*sys.modules)); {FACEGENDER}"
    done = run_python(code, *words)
    heavy = {"dvc", "keras", "mlflow", "numpy", "pandas", "scipy", "sklearn", "tensorflow", "tqdm"}
    return heavy & set(done.stdout.splitlines()[-1].split())


def test_commands_that_must_start_fast_import_little(exported: Exported, folder: Path) -> None:
    assert imported("--help") == set()
    assert imported("predict", "--help") == set()
    assert imported("predict", "--model", exported.float32, folder / "00.png") == {"numpy"}
    # The test can find what it looks for.
    found = imported("predict", "--model", exported.keras, folder / "00.png")
    assert {"keras", "tensorflow"} <= found


def test_only_a_model_named_by_the_user_is_probed(
    exported: Exported, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[Path] = []
    monkeypatch.setattr("facegender.inference.litert.probe_litert", probed.append)
    (tmp_path / "models").mkdir()
    shutil.copy(exported.float32, tmp_path / "models")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert _run(["predict", str(folder / "00.png")]) == 0
    assert probed == []
    assert predict(exported.float32, folder / "00.png") == 0
    assert probed == [exported.float32]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        _run([command, "--help"])
    assert f"usage: facegender {command}" in capsys.readouterr().out
