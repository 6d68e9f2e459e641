"""One picture is cut out alike everywhere: the model sees the same pixels in all six fronts.

These are the processed data, which training, evaluation and export read, `facegender predict`, the
server, `facegender score`, and `facegender demo`, which also shows the crop on its page.
"""

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from facegender.cli.demo import judge
from facegender.data.face_table import find_all_faces, read_faces
from facegender.data.manifest import write_table
from facegender.data.preprocessing import write_split
from facegender.data.processed import ProcessedSplit
from facegender.faces.settings import FaceCrop
from facegender.inference import serving
from facegender.inference.prediction import predict_images
from facegender.inference.predictor import Predictor

CROP = FaceCrop(margin=0.25, align=True, min_score=0.75, min_size=24)
SIZE = 48


@pytest.fixture
def photo(shared: Path, tmp_path: Path) -> Path:
    """A JPEG of a tilted face, small in the picture, that lies on its side by its EXIF."""
    with Image.open(shared / "faces" / "male" / "03.jpg") as portrait:
        tilted = portrait.convert("RGB").rotate(12, fillcolor=(120, 130, 110))
    picture = Image.new("RGB", (1300, 900), (120, 130, 110))
    picture.paste(tilted.resize((420, 420)), (600, 150))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.jpg", exif=exif)
    return tmp_path / "photo.jpg"


@pytest.fixture
def tight(shared: Path, tmp_path: Path) -> Path:
    """A face that fills its picture."""
    with Image.open(shared / "faces" / "male" / "03.jpg") as portrait:
        portrait.crop((60, 40, 190, 200)).save(tmp_path / "tight.png")
    return tmp_path / "tight.png"


class Recorder:
    """A model that keeps what it sees."""

    def __init__(self, crop: FaceCrop | None) -> None:
        self.seen: list[np.ndarray] = []
        self.predictor = Predictor(SIZE, self._predict, crop)

    def _predict(self, batch: np.ndarray) -> np.ndarray:
        self.seen.extend(batch)
        return np.full(len(batch), 0.5)

    def serve(self, items: list, params: dict | None = None) -> None:
        server = serving.FaceGender()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serving, "load_litert", lambda path, threads: self.predictor)
            context = SimpleNamespace(artifacts={"model": ""}, model_config={"threshold": 0.5})
            server.load_context(context)
        server.predict(None, items, params)


def processed(path: Path, crop: FaceCrop | None, folder: Path) -> np.ndarray:
    manifest = pd.DataFrame({"path": [path.name], "label": [1], "sha256": ["-"]})
    faces = None
    if crop:
        write_table(find_all_faces(manifest, path.parent, crop, jobs=1), folder / "faces.csv")
        faces = read_faces(folder / "faces.csv")
    options = {"size": SIZE, "name": "test", "jobs": 1, "crop": crop, "faces": faces}
    assert write_split(manifest, path.parent, folder / "test", **options) == []
    (pixels,) = next(ProcessedSplit(folder / "test").batches(1))
    return pixels


def in_predict(path: Path, model: Recorder) -> None:
    list(predict_images([model.predictor], [("photo", path)]))


def in_server(path: Path, model: Recorder) -> None:
    model.serve([base64.b64encode(path.read_bytes()).decode()])


def in_score(path: Path, model: Recorder) -> None:
    from facegender.batch_scoring.tasks import _decode

    rows = _decode(path, SIZE, model.predictor.crop)
    # Spark runs the served model on what was cut out.
    model.serve([row[0] for row in rows], {"whole": True} if model.predictor.crop else None)


def in_demo(path: Path, model: Recorder) -> None:
    (face,) = judge(path.read_bytes(), model.predictor, 0.5)["faces"]
    shown = Image.open(io.BytesIO(base64.b64decode(face["crop"].partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(shown), model.seen[0])


@pytest.mark.parametrize("front", [in_predict, in_server, in_score, in_demo])
@pytest.mark.parametrize("crop", [CROP, replace(CROP, align=False), None])
@pytest.mark.parametrize("name", ["photo", "tight"])
def test_the_model_sees_the_same_pixels_in_all_fronts(
    name: str,
    crop: FaceCrop | None,
    front: Callable[[Path, Recorder], None],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    path = request.getfixturevalue(name)
    model = Recorder(crop)
    front(path, model)
    (seen,) = model.seen
    np.testing.assert_array_equal(seen, processed(path, crop, tmp_path))
