"""A line for each face, cut out as the model's file says."""

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from mlflow.pyfunc.scoring_server import predictions_to_json
from PIL import Image

from facegender.cli.main import _run
from facegender.data import images
from facegender.data.face_images import face_images
from facegender.data.images import decode_picture
from facegender.errors import UserError
from facegender.faces.crop import cut_out, find_faces
from facegender.faces.settings import FaceCrop
from facegender.inference.litert import load_litert
from facegender.inference.model_crop import read_crop, write_crop
from facegender.inference.serving import FaceGender
from facegender.model.attachment import attach
from tests.conftest import Exported
from tests.unit.conftest import two_faces

CROP = FaceCrop(margin=0.25, align=False, min_score=0.75, min_size=24)


@pytest.fixture(scope="module")
def model(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copy(exported.float32, tmp_path_factory.mktemp("model")))
    write_crop(path, CROP)
    return path


@pytest.fixture
def whole(exported: Exported, tmp_path: Path) -> Path:
    """A copy of the exported model, which judges whole pictures, to change."""
    return Path(shutil.copy(exported.float32, tmp_path))


@pytest.fixture(scope="module")
def photos(portrait: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of two faces, of one and of none, and one that is damaged."""
    folder = tmp_path_factory.mktemp("photos")
    two_faces(portrait).save(folder / "a-two.png")
    portrait.save(folder / "b-one.png")
    Image.new("RGB", (300, 200), (120, 130, 110)).save(folder / "c-none.png")
    (folder / "d-bad.png").write_bytes(b"?")
    return folder


def predict(model: Path, *arguments: object) -> int:
    return _run(["predict", "--model", str(model), *map(str, arguments)])


def answers(
    capsys: pytest.CaptureFixture, model: Path, *arguments: object, code: int = 1
) -> list[dict]:
    assert predict(model, "--json", *arguments) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_there_is_a_line_for_each_face(
    model: Path, photos: Path, capsys: pytest.CaptureFixture
) -> None:
    large, small, one, none, bad = answers(capsys, model, photos)
    assert Path(large["image"]).name == Path(small["image"]).name == "a-two.png"
    assert large["width"] > 1.4 * small["width"]
    assert small["left"] > 600
    predictor = load_litert(model)
    for answer in (large, small, one):
        picture = decode_picture(Path(answer["image"]))[0]
        face = {round(face.left, 2): face for face in find_faces(picture, CROP)}[answer["left"]]
        assert answer["score"] == face.score >= 0.75
        pixels = cut_out(picture, face, CROP, predictor.size)
        assert answer["probability"] == pytest.approx(predictor.predict(pixels[None])[0], abs=1e-6)
    assert (none["label"], none["probability"], none["error"]) == ("no face", None, None)
    assert (bad["label"], bad["left"]) == (None, None)
    assert "not an image" in bad["error"]


def test_the_largest_alone_and_the_whole_picture(
    model: Path, exported: Exported, photos: Path, capsys: pytest.CaptureFixture
) -> None:
    every = answers(capsys, model, photos)
    largest = answers(capsys, model, "--largest", photos)
    assert largest == [every[0], *every[2:]]
    whole = answers(capsys, model, "--whole", photos)
    assert whole == answers(capsys, exported.float32, photos)
    assert [answer["label"] is None for answer in whole] == [False, False, False, True]


def test_text_and_csv_say_where_faces_are(
    model: Path, photos: Path, capsys: pytest.CaptureFixture
) -> None:
    paths = [str(photos / name) for name in ("a-two.png", "c-none.png")]
    large, small, _ = answers(capsys, model, *paths, code=0)
    assert predict(model, *paths) == 0
    lines = capsys.readouterr().out.splitlines()
    place = f"{round(large['width'])}x{round(large['height'])} at {round(large['left'])},"
    assert place in lines[0]
    assert lines[2] == f"no face  {paths[1]}"
    assert predict(model, "--csv", *paths) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert list(rows[0])[:4] == ["image", "label", "probability", "error"]
    assert [float(rows[1][key]) for key in ("left", "score")] == [small["left"], small["score"]]
    assert (rows[2]["label"], rows[2]["probability"], rows[2]["left"]) == ("no face", "", "")


def test_photos_are_drawn_with_their_boxes(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    drawn = tmp_path / "drawn"
    one = answers(capsys, model, "--draw", drawn, photos)[2]
    names = ["0001-a-two.png", "0002-b-one.png", "0003-c-none.png"]
    assert sorted(path.name for path in drawn.iterdir()) == names
    before, after = decode_picture(photos / "b-one.png")[0], decode_picture(drawn / names[1])[0]
    changed = np.argwhere((np.asarray(before) != np.asarray(after)).any(2))
    assert changed.max(0)[0] == pytest.approx(one["top"] + one["height"], abs=2)


def test_boxes_in_a_very_large_photo_are_in_its_own_pixels(
    model: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Above 50 megapixels, faces are looked for in the halved picture."""
    path = photos / "b-one.png"
    (small,) = answers(capsys, model, path, code=0)
    large = Image.open(path)
    monkeypatch.setattr(images, "_FULL_PIXELS", large.width * large.height - 1)
    assert decode_picture(path)[0].width == large.width // 2
    (halved,) = answers(capsys, model, "--draw", tmp_path / "drawn", path, code=0)
    for side in ("left", "top", "width", "height"):
        assert halved[side] == pytest.approx(small[side], abs=0.02 * large.width)
        assert halved[side] == round(halved[side], 2)
    # As are the sizes of faces that are passed over.
    for share, found in ((0.8, True), (1.2, False)):
        crop = replace(CROP, min_size=round(share * halved["width"]))
        assert (face_images(path, 48, crop)[0][0] is not None) == found
    drawn = np.asarray(Image.open(tmp_path / "drawn" / "0001-b-one.png"))
    changed = np.argwhere((drawn != np.asarray(decode_picture(path)[0])).any(2))
    assert changed.max(0)[0] == pytest.approx((halved["top"] + halved["height"]) / 2, abs=2)


def test_an_image_named_twice_is_drawn_twice(model: Path, photos: Path, tmp_path: Path) -> None:
    paths = [photos / name for name in ("a-two.png", "a-two.png", "b-one.png", "b-one.png")]
    assert predict(model, "--draw", tmp_path / "drawn", *paths) == 0
    names = ["0001-a-two.png", "0002-a-two.png", "0003-b-one.png", "0004-b-one.png"]
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == names


def test_an_image_with_the_longest_name_is_drawn(model: Path, photos: Path, tmp_path: Path) -> None:
    name = "ü" * 125 + ".png"  # 254 bytes
    (tmp_path / name).write_bytes((photos / "b-one.png").read_bytes())
    assert predict(model, "--draw", tmp_path / "drawn", tmp_path / name) == 0
    (path,) = (tmp_path / "drawn").iterdir()
    assert path.name == f"0001-{'ü' * 122}.png"


def test_a_folder_that_cannot_be_written_is_named(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write into"):
        predict(model, "--draw", tmp_path / "file", photos)


def test_drawn_photos_do_not_lie_among_those_to_be_judged(model: Path, photos: Path) -> None:
    for folder in (photos, photos.parent, photos / ".." / photos.name):
        with pytest.raises(UserError, match=r"contains the input .*a-two\.png"):
            predict(model, "--draw", folder, photos)


def test_an_empty_folder_is_not_the_current_one(
    model: Path, photos: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        predict(model, "--draw", "", photos)
    assert "argument --draw: it is empty" in capsys.readouterr().err


def test_drawn_photos_do_not_lie_among_links_to_photos(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "link.png").symlink_to(photos / "b-one.png")
    with pytest.raises(UserError, match=r"contains the input .*link\.png"):
        predict(model, "--draw", tmp_path, tmp_path)


def test_a_label_at_the_edge_of_a_photo_is_drawn_inside(
    model: Path, tmp_path: Path, portrait: Image.Image
) -> None:
    picture = Image.new("RGB", (800, 600), (120, 130, 110))
    picture.paste(portrait.resize((500, 500)), (490, 50))
    picture.save(tmp_path / "edge.png")
    drawn = tmp_path / "drawn"
    assert predict(model, "--draw", drawn, tmp_path / "edge.png") == 0
    changed = np.asarray(decode_picture(drawn / "0001-edge.png")[0]) != np.asarray(picture)
    # The label is wider than what the photo shows of the box.
    assert np.argwhere(changed.any(2)).min(0)[1] < 650


def test_the_crop_is_in_the_file_and_changes_no_probability(
    model: Path, exported: Exported
) -> None:
    assert read_crop(model) == CROP
    assert read_crop(exported.float32) is None
    plain, cropping = load_litert(exported.float32), load_litert(model)
    assert (plain.crop, cropping.crop) == (None, CROP)
    np.testing.assert_array_equal(plain.predict(exported.images), cropping.predict(exported.images))


def test_without_a_crop_the_file_stays_as_it_is(exported: Exported, whole: Path) -> None:
    write_crop(whole, None)
    assert whole.read_bytes() == exported.float32.read_bytes()


def test_a_keras_file_carries_it_too(exported: Exported, tmp_path: Path) -> None:
    from facegender.inference.loading import load_predictors

    path = Path(shutil.copy(exported.keras, tmp_path))
    write_crop(path, CROP)
    (predictor,) = load_predictors(path, 1, trusted=True)
    assert predictor.crop == CROP


@pytest.mark.parametrize("text", ["{}", "no JSON", "x" * 20_000])
def test_a_damaged_crop_is_named(whole: Path, text: str) -> None:
    attach(whole, "face_crop.json", text)
    with pytest.raises(UserError, match=r"does not say how faces are cut out.*dvc repro"):
        read_crop(whole)


def test_a_crop_with_a_wrong_checksum_is_named_and_not_taken_for_none(
    model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(model.read_bytes().replace(b'"margin": 0.25', b'"margin": 0.35'))
    with pytest.raises(UserError, match=r"does not say how faces are cut out.*Bad CRC"):
        read_crop(path)


def test_the_server_answers_for_the_largest_face_and_lists_all(
    model: Path, photos: Path, capsys: pytest.CaptureFixture
) -> None:
    large, small, one, *_ = answers(capsys, model, photos)
    server = FaceGender()
    server.load_context(
        SimpleNamespace(artifacts={"model": str(model)}, model_config={"threshold": 0.5})
    )
    contents = [(photos / f"{name}.png").read_bytes() for name in ("a-two", "b-one", "c-none")]
    answer = server.predict(None, contents)
    assert list(answer.columns) == ["label", "probability", "faces"]
    assert list(answer["label"]) == [large["label"], one["label"], "no face"]
    assert answer["probability"].isna().tolist() == [False, False, True]
    listed = [face for faces in answer["faces"] for face in faces]
    for face, line in zip(listed, (large, small, one), strict=True):
        assert face["probability"] == pytest.approx(line["probability"], abs=1e-6)
        assert {key: face[key] for key in ("left", "top", "width", "height", "score", "label")} == {
            key: line[key] for key in ("left", "top", "width", "height", "score", "label")
        }
    in_table = server.predict(None, pd.Series(contents, index=[7, 5, 6]))
    pd.testing.assert_frame_equal(in_table, answer.set_axis([7, 5, 6]))
    # As MLflow sends it: strict readers of JSON refuse NaN.
    sent = io.StringIO()
    predictions_to_json(answer, sent)
    assert "NaN" not in sent.getvalue()
    said = [item["probability"] for item in json.loads(sent.getvalue())["predictions"]]
    assert said == [*answer["probability"][:2], None]
    array = np.asarray(decode_picture(photos / "b-one.png")[0])
    assert server.predict(None, [array])["faces"][0] == answer["faces"][1]
    whole = server.predict(None, contents, {"whole": True})
    assert list(whole.columns) == ["label", "probability"]
    assert whole["probability"].notna().all()


def test_score_has_a_row_an_image_with_its_faces(model: Path, photos: Path) -> None:
    import pyarrow as pa

    from facegender.batch_scoring.tasks import _decode, _one_row_an_image

    rows = [
        {
            "image": name,
            "error": error,
            "box": box,
            "first": first,
            "label": "male" if box else None,
            "probability": 0.9 if box else None,
        }
        for name in ("a-two.png", "c-none.png", "d-bad.png")
        for _, error, box, first in _decode(photos / name, 32, CROP)
    ]
    assert [row["first"] for row in rows] == [True, False, True, True]
    two, none, bad = _one_row_an_image(pa.Table.from_pylist(rows)).to_pylist()
    assert [face["probability"] for face in json.loads(two["faces"])] == [0.9, 0.9]
    assert json.loads(two["faces"])[0]["left"] < json.loads(two["faces"])[1]["left"]
    assert (none["label"], none["error"], none["faces"]) == ("no face", None, "[]")
    assert bad["label"] is None
    assert "not an image" in bad["error"]
