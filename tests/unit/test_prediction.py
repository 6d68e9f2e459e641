import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from facegender.errors import UserError
from facegender.inference.export import MAX_FLOAT_DIFFERENCE
from facegender.inference.litert import load_litert
from facegender.inference.loading import keras_predictor
from facegender.inference.prediction import predict_images
from facegender.inference.predictor import Predictor
from facegender.model.saved_model import load_model
from tests.conftest import Exported


@pytest.fixture
def sources(tmp_path: Path) -> list[tuple[str, bytes | Path]]:
    """Grey pictures, each brighter than the one before; the sixth is damaged."""
    paths = [tmp_path / f"{number:02}.png" for number in range(26)]
    for number, path in enumerate(paths):
        Image.new("RGB", (8, 8), (10 * number,) * 3).save(path)
    paths[5].write_bytes(b"?")
    return [(path.name, path) for path in paths]


class Brightness:
    """A stand-in for a model that notes its batches: P(male) is the brightness."""

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds
        self.batches: list[int] = []

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        time.sleep(self.seconds)
        self.batches.append(len(batch))
        return batch.mean((1, 2, 3)) / 255


def test_order_is_that_of_the_sources_whichever_thread_is_quicker(sources: list) -> None:
    models = Brightness(0.03), Brightness()
    predictors = [Predictor(8, model) for model in models]
    predictions = [item for (item,) in predict_images(predictors, sources, batch_size=3)]
    assert [item.image for item in predictions] == [name for name, _ in sources]
    assert all(model.batches for model in models)
    assert sorted(models[0].batches + models[1].batches) == [2, 2, *[3] * 7]
    broken = predictions.pop(5)
    assert broken.error == "not an image in a known format"
    assert (broken.label, broken.probability) == (None, None)
    expected = [10 * number / 255 for number in range(26) if number != 5]
    assert [item.probability for item in predictions] == pytest.approx(expected)


def test_it_works_ahead_by_two_batches_a_predictor_and_no_more(sources: list) -> None:
    model = Brightness()
    predictions = predict_images([Predictor(8, model)], sources, batch_size=2)
    next(predictions)
    time.sleep(0.2)
    assert len(model.batches) <= 3
    predictions.close()


def test_a_batch_without_a_readable_image_asks_the_model_nothing(sources: list) -> None:
    model = Brightness()
    ((only,),) = predict_images([Predictor(8, model)], sources[5:6])
    assert only.error is not None
    assert model.batches == []


def test_a_failing_model_is_an_error_and_no_hang(sources: list) -> None:
    fail = Mock(side_effect=RuntimeError("out of order"))
    with pytest.raises(RuntimeError, match="out of order"):
        list(predict_images([Predictor(8, fail)], sources))


@pytest.mark.parametrize(
    ("brightness", "threshold", "abstain_below", "label"),
    [
        (51, 0.5, 0.5, "female"),
        (51, 0.1, 0.0, "male"),  # though female is likelier
        (51, 0.2, 0.0, "male"),  # 51 / 255 is the threshold
        (51, 0.1, 0.2, "male"),
        (51, 0.1, 0.21, "uncertain"),
        (204, 0.9, 0.0, "female"),
        (51, 0.5, 0.79, "female"),
        (51, 0.5, 0.81, "uncertain"),
        (204, 0.5, 0.79, "male"),
        (204, 0.5, 0.81, "uncertain"),
        (204, 0.9, 0.21, "uncertain"),
        (255, 0.5, 1.0, "male"),
    ],
)
def test_the_label_of_a_probability(
    tmp_path: Path, brightness: int, threshold: float, abstain_below: float, label: str
) -> None:
    Image.new("RGB", (8, 8), (brightness,) * 3).save(tmp_path / "a.png")
    ((prediction,),) = predict_images(
        [Predictor(8, Brightness())],
        [("a", tmp_path / "a.png")],
        threshold=threshold,
        abstain_below=abstain_below,
    )
    assert prediction.label == label
    assert prediction.probability == pytest.approx(brightness / 255)


def test_litert_takes_batches_of_any_size(exported: Exported) -> None:
    predictor = load_litert(exported.float32)
    assert predictor.size == 32
    parts = np.split(exported.images, [1, 8, 15, 16])
    predicted = np.concatenate([predictor.predict(part) for part in parts])
    np.testing.assert_array_equal(predicted, predictor.predict(exported.images))
    np.testing.assert_allclose(predicted, exported.probabilities, atol=MAX_FLOAT_DIFFERENCE, rtol=0)


def test_keras_predicts_the_same_way(exported: Exported) -> None:
    predictor = keras_predictor(load_model(exported.keras))
    assert predictor.size == 32
    predicted = predictor.predict(exported.images)
    np.testing.assert_allclose(predicted, exported.probabilities, atol=MAX_FLOAT_DIFFERENCE, rtol=0)


def test_a_missing_model_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.tflite: No such file.*dvc repro.*dvc pull"):
        load_litert(tmp_path / "absent.tflite")


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_a_truncated_model_is_a_clear_error(
    exported: Exported, tmp_path: Path, share: float
) -> None:
    content = exported.float32.read_bytes()
    (tmp_path / "cut.tflite").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"cut\.tflite is damaged.*dvc repro.*dvc pull"):
        load_litert(tmp_path / "cut.tflite")


def test_a_model_of_something_else_is_a_clear_error(tmp_path: Path) -> None:
    import tensorflow as tf

    double = tf.function(lambda x: 2 * x, input_signature=[tf.TensorSpec((1, 3), tf.float32)])
    converter = tf.lite.TFLiteConverter.from_concrete_functions([double.get_concrete_function()])
    (tmp_path / "double.tflite").write_bytes(converter.convert())
    with pytest.raises(UserError, match=r"did not export the model double.*float32"):
        load_litert(tmp_path / "double.tflite")
