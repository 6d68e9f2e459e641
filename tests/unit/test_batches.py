import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from facegender.data.preprocessing import write_split
from facegender.data.processed import ProcessedSplit
from facegender.data.raw_manifest import build_manifest
from facegender.training.batches import _cut, make_batches, make_feature_batches, weigh
from facegender.training.strategy import WHOLE, Share


def collect(part: ProcessedSplit, **options: object) -> tuple[list[np.ndarray], np.ndarray]:
    batches = [(x.numpy(), y.numpy()) for x, y in make_batches(part, 16, **options)]
    return [x for x, _ in batches], np.concatenate([y[:, 0] for _, y in batches])


def test_batches_hold_every_image_once_with_its_label(part: ProcessedSplit) -> None:
    images, labels = collect(part, shuffle_seed=3)
    assert [len(batch) for batch in images] == [16, 16, 8]
    brightness = np.concatenate(images).mean((1, 2, 3))
    np.testing.assert_array_equal(labels, brightness > 127)
    assert sorted(brightness) == sorted(part.images.mean((1, 2, 3)))


def test_without_a_seed_the_order_is_the_index(part: ProcessedSplit) -> None:
    images, labels = collect(part)
    np.testing.assert_array_equal(np.concatenate(images), part.images)
    np.testing.assert_array_equal(labels, part.labels)


def test_an_epochs_order_does_not_depend_on_the_epochs_before_it(part: ProcessedSplit) -> None:
    _, both = collect(part, shuffle_seed=3, epochs=range(4, 6))
    _, second = collect(part, shuffle_seed=3, epochs=range(5, 6))
    _, other = collect(part, shuffle_seed=4, epochs=range(5, 6))
    np.testing.assert_array_equal(both[40:], second)
    assert (both[:40] != second).any()
    assert (other != second).any()


def test_several_epochs_follow_each_other_each_with_every_image(part: ProcessedSplit) -> None:
    images, labels = collect(part, shuffle_seed=3, epochs=range(3))
    assert [len(batch) for batch in images] == [16, 16, 8] * 3
    alone = [collect(part, shuffle_seed=3, epochs=range(epoch, epoch + 1)) for epoch in range(3)]
    np.testing.assert_array_equal(
        np.concatenate(images), np.concatenate([batch for batches, _ in alone for batch in batches])
    )
    np.testing.assert_array_equal(labels, np.concatenate([labels for _, labels in alone]))
    assert len(make_batches(part, 16, epochs=range(3))) == 9


def test_no_dataset_starts_the_tuner_for_which_fit_would_wait(part: ProcessedSplit) -> None:
    features = make_feature_batches(np.zeros((8, 3)), np.zeros(8), 4)
    for batches in (make_batches(part, 16, size=16), features):
        assert batches.options().autotune.enabled is False
        assert weigh(batches, [1, 1]).options().autotune.enabled is False


def test_rows_without_an_image_are_left_out(
    make_images: Callable[..., Path], tmp_path: Path
) -> None:
    raw = make_images(per_class=20)
    for name in ("female/000.png", "female/007.png", "male/019.png"):
        (raw / name).write_bytes(b"not an image")
    manifest = build_manifest(raw, female=["female"], male=["male"], ignore=[])
    assert len(write_split(manifest, raw, tmp_path / "part", size=32, name="train", jobs=1)) == 3
    part = ProcessedSplit(tmp_path / "part")
    images, labels = collect(part)
    np.testing.assert_array_equal(np.concatenate(images), part.images[part.rows])
    np.testing.assert_array_equal(np.concatenate(list(part.batches(16))), part.images[part.rows])
    np.testing.assert_array_equal(labels, [0] * 18 + [1] * 19)
    shuffled, _ = collect(part, shuffle_seed=3)
    assert (np.concatenate(shuffled).max((1, 2, 3)) > 0).all()  # a left-out row is black


def test_images_are_read_in_the_order_asked_for(part: ProcessedSplit) -> None:
    positions = np.array([39, 0, 7, 7])
    for _ in range(2):
        images = part.read(positions)
        np.testing.assert_array_equal(images, part.images[positions])
        images[:] = 1  # of a copy
    assert part.read(np.array([], np.int64)).shape == (0, 32, 32, 3)


def test_a_file_that_became_shorter_is_an_error(part: ProcessedSplit, tmp_path: Path) -> None:
    os.truncate(tmp_path / "part" / "images.npy", 1000)
    with pytest.raises(OSError, match="ends within row 39"):
        part.read(np.array([39]))


@pytest.mark.parametrize("images", [40, 2])
def test_shares_are_the_pieces_of_each_batch(part: ProcessedSplit, images: int) -> None:
    def positions(share: Share) -> list[list[int]]:
        features = np.arange(images)[:, None]
        batches = make_feature_batches(features, np.zeros(images), 16, shuffle_seed=3, share=share)
        return [rows[:, 0].tolist() for rows, _ in batches.as_numpy_iterator()]

    whole = positions(WHOLE)
    # Two processes, with one device and with two.
    first, second = positions(Share(0, 1, 3)), positions(Share(1, 2, 3))
    for number, batch in enumerate(whole):
        pieces = [first[number], *second[2 * number : 2 * number + 2]]
        assert [row for piece in pieces for row in piece] == (
            batch if len(batch) >= 3 else [*batch, batch[0]]
        )
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    assert len(second) == 2 * len(first) == 2 * len(whole)


def wide_part(folder: Path, count: int = 40) -> ProcessedSplit:
    """Images whose brightness says how far to the right a pixel is, and whose red how far down."""
    side, border = 40, 4
    y, x = np.mgrid[:side, :side] * 5
    wide = np.broadcast_to(np.stack([y, x, x], axis=-1).astype(np.uint8), (count, side, side, 3))
    folder.mkdir()
    np.save(folder / "wide.npy", wide)
    np.save(folder / "images.npy", wide[:, border:-border, border:-border])
    rows = [f"{row}.png,{row % 2},-,{row}\n" for row in range(count)]
    (folder / "index.csv").write_text("path,label,sha256,row\n" + "".join(rows))
    return ProcessedSplit(folder)


def test_images_with_a_border_are_cut_at_random_within_it(tmp_path: Path) -> None:
    part = wide_part(tmp_path / "wide")
    plain, labels = collect(part)
    np.testing.assert_array_equal(np.concatenate(plain), part.images)
    batches, cut_labels = collect(part, framing_seed=7, epochs=range(3))
    cut = np.concatenate(batches).astype(float)
    assert cut.shape == (120, 32, 32, 3)
    np.testing.assert_array_equal(cut_labels, np.tile(labels, 3))
    # In pixels of the wide image: how far apart the ends are, and where the middle is.
    for channel, axis in ((0, 1), (1, 2)):
        ends = np.take(cut[..., channel], [0, -1], axis=axis).mean(axis=3 - axis) / 5
        zoom = (ends[:, 1] - ends[:, 0]) / 31
        middle = ends.mean(1) - 19.5
        assert 1 - 4 / 32 - 0.02 < zoom.min() < 0.92
        assert 1.08 < zoom.max() < 1 + 4 / 32 + 0.02
        assert -2.1 < middle.min() < -1.5
        assert 1.5 < middle.max() < 2.1
    assert len(np.unique(cut, axis=0)) > 110
    assert collect(part, framing_seed=7, size=16)[0][0].shape == (16, 16, 16, 3)


def test_how_an_image_is_cut_depends_on_seed_epoch_and_image_alone(tmp_path: Path) -> None:
    part = wide_part(tmp_path / "wide", count=8)
    first, again = (collect(part, framing_seed=7, epochs=range(2, 3))[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    shares = [
        make_batches(part, 16, framing_seed=7, epochs=range(2, 3), share=Share(piece, 1, 2))
        for piece in range(2)
    ]
    halves = [images for share in shares for images, _ in share.as_numpy_iterator()]
    np.testing.assert_array_equal(np.concatenate(halves), first[0])
    for other in ({"framing_seed": 8, "epochs": range(2, 3)}, {"framing_seed": 7}):
        assert (collect(part, **other)[0][0] != first[0]).any()


def test_without_a_draw_the_cut_is_the_image(tmp_path: Path) -> None:
    part = wide_part(tmp_path / "wide", count=2)
    cut = _cut(part.wide.read(np.arange(2)), 32, np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(cut, part.images)
