import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from facegender.data.processed import ProcessedSplit
from facegender.params import Params, Train
from facegender.training.checkpoints import Checkpoint, inputs_digest, open_checkpoint
from tests.conftest import run_python
from tests.networks import train_small
from tools.compose_params import ROOT

# A recipe as quick: from scratch, the best epoch kept, all that is random.
QUICK = {"epochs": 5, "warmup_epochs": 1, "learning_rate": 0.01}
# A recipe as best: head, small images, averaged weights, BatchNorm folded, several passes.
BEST = {
    "head_epochs": 2,
    "head_learning_rate": 0.01,
    "epochs": 4,
    "warmup_epochs": 1,
    "min_steps_per_epoch": 4,
    "small_image_size": 32,
    "small_epochs": 2,
    "ema_epochs": 0.5,
    "batch_norm": "frozen",
    "weight_decay": 0.01,
    "label_smoothing": 0.05,
    "keep": "last",
}
STOPPING = {"epochs": 8, "early_stopping_patience": 1, "learning_rate": 0.1}


@pytest.fixture
def recipe(params: Params) -> Callable[[dict], Train]:
    everything = params.train.augmentation.model_copy(
        update={"rotation": 0.1, "brightness": 0.1, "contrast": 0.1}
    )
    base = params.train.model_copy(update={"batch_size": 16, "augmentation": everything})
    return lambda changes: base.model_copy(update=changes)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        pytest.param(BEST, 1, id="best"),
        pytest.param(BEST, 3, id="best more often", marks=pytest.mark.campaign),
        pytest.param(QUICK, 2, id="quick", marks=pytest.mark.campaign),
        pytest.param(STOPPING, 1, id="stopping", marks=pytest.mark.campaign),
    ],
)
def test_a_training_that_was_interrupted_ends_with_the_same_bits(
    part: ProcessedSplit, recipe: Callable, tmp_path: Path, changes: dict, times: int
) -> None:
    steps: list[int] = []
    expected = train_small(part, recipe(changes), Checkpoint(None), on_step=steps.append)
    generator = np.random.default_rng(times)
    # The first epoch, too, has steps: then there is nothing to go on from.
    for place in sorted(generator.choice(steps, times, replace=False).tolist()):
        path = tmp_path / f"{place}.npz"
        seen: list[int] = []

        def stop_at(step: int, place: int = place) -> None:
            if step == place:
                raise Interrupted

        with pytest.raises(Interrupted):
            train_small(part, recipe(changes), Checkpoint(path), on_step=stop_at)
        resumed = train_small(
            part,
            recipe(changes),
            Checkpoint(path),
            on_epoch=lambda epoch, metrics, ended, seen=seen: seen.append(epoch),
        )
        assert resumed.bits == expected.bits, f"interrupted at step {place}"
        assert resumed.history.equals(expected.history)
        assert resumed.kept_epoch == expected.kept_epoch
        assert len(resumed.speed) == len(expected.speed)
        assert seen == expected.history["epoch"].tolist()


@pytest.mark.campaign  # in short: test_faults.py, in the pipeline
def test_a_training_that_was_killed_goes_on(
    part: ProcessedSplit, recipe: Callable, tmp_path: Path
) -> None:
    expected = train_small(part, recipe(BEST), Checkpoint(None))
    (tmp_path / "recipe.json").write_text(recipe(BEST).model_dump_json())
    path = tmp_path / "checkpoint.npz"
    kill_at = 12
    code = (
        "import os, signal, sys; from pathlib import Path;"
        "from facegender.training.checkpoints import Checkpoint;"
        "from facegender.params import Train;"
        "from facegender.data.processed import ProcessedSplit;"
        "from tests.networks import train_small;"
        "folder, kill_at = Path(sys.argv[1]), int(sys.argv[2]);"
        "recipe = Train.model_validate_json((folder / 'recipe.json').read_text());"
        "kill = lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == kill_at else None;"
        "split = ProcessedSplit(folder / 'part');"
        "train_small(split, recipe, Checkpoint(folder / 'checkpoint.npz'), kill)"
    )
    done = run_python(code, tmp_path, str(kill_at), check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoint = Checkpoint(path)
    assert checkpoint.saved is not None
    resumed = train_small(part, recipe(BEST), checkpoint)
    assert resumed.bits == expected.bits


def test_what_is_kept_comes_back_bit_by_bit(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.npz"
    arrays = {
        "weights.0": np.array([0.1, np.nan, -0.0], np.float32),
        "optimizer.0": np.array(7, np.int64),
    }
    checkpoint = Checkpoint(path)
    checkpoint.run_id = "abc"
    checkpoint.write(arrays, {"loss": 0.1 + 0.2, "worst": float("inf")})
    again = Checkpoint(path)
    assert again.saved is not None
    assert again.run_id == "abc"
    assert again.saved.notes["loss"] == 0.1 + 0.2
    assert again.saved.notes["worst"] == float("inf")
    for name, array in arrays.items():
        assert again.saved.arrays[name].tobytes() == array.tobytes()
        assert again.saved.arrays[name].dtype == array.dtype
    assert sorted(tmp_path.iterdir()) == [path]
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []


def test_another_process_goes_on_from_a_checkpoint_and_keeps_none(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.npz"
    assert Checkpoint(path).content() == b""
    Checkpoint(path).write({"weights.0": np.ones(3)}, {"loss": 0.5})
    received = Checkpoint.received(Checkpoint(path).content())
    assert received.saved is not None
    assert received.saved.notes["loss"] == 0.5
    np.testing.assert_array_equal(received.saved.arrays["weights.0"], np.ones(3))
    received.write({}, {})
    received.remove()
    assert list(tmp_path.iterdir()) == [path]
    assert Checkpoint.received(b"").saved is None


def in_directory(archive: bytes, offset: int, byte: bytes) -> bytes:
    """Change a zero byte of the first entry of a ZIP archive's directory."""
    at = archive.index(b"PK\x01\x02") + offset
    return archive[:at] + byte + archive[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda whole: whole[:500], id="cut off"),
        pytest.param(lambda whole: b"", id="empty"),
        pytest.param(lambda whole: in_directory(whole, 10, b"c"), id="method"),
        pytest.param(lambda whole: in_directory(whole, 8, b"\1"), id="flags"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_or_written_costs_itself_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "checkpoint.npz"
    Checkpoint(path).write({"weights.0": np.zeros(1000)}, {})
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    assert Checkpoint(path).saved is None
    assert "training starts again" in caplog.text
    Checkpoint(tmp_path / "absent" / "checkpoint.npz").write({"weights.0": np.zeros(9)}, {})
    assert "no checkpoint of this epoch" in caplog.text


def test_the_same_training_in_two_processes_has_one_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_checkpoint(tmp_path, "a" * 64) as first:
        first.write({}, {})
        with open_checkpoint(tmp_path, "a" * 64) as second:
            assert second.saved is None
            second.write({"weights.0": np.zeros(3)}, {})
            second.remove()
        assert "this one saves no checkpoint" in caplog.text
    with open_checkpoint(tmp_path, "a" * 64) as third:
        assert third.saved is not None
        assert third.saved.arrays == {}


def test_old_checkpoints_are_cleared(tmp_path: Path) -> None:
    for name, days in (("old", 20), ("new", 1)):
        path = tmp_path / f"{name}.npz"
        Checkpoint(path).write({}, {})
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - days * 86400))
    # Listed and then gone, because another training cleared it in between.
    (tmp_path / "gone.npz").symlink_to("cleared")
    with open_checkpoint(tmp_path, "other"):
        pass
    assert not (tmp_path / "old.npz").exists()
    assert (tmp_path / "new.npz").exists()


def test_the_digest_changes_with_all_that_decides(
    part: ProcessedSplit, params: Params, tmp_path: Path
) -> None:
    weights = tmp_path / "start.weights.h5"
    weights.write_bytes(b"1")

    def digest(name: str, **changes: object) -> str:
        changed = getattr(params, name).model_copy(update=changes)
        return inputs_digest(params.model_copy(update={name: changed}), [part])

    first = digest("train")
    assert digest("gate", significance=0.01) == first
    others = [digest("train", seed=1), digest("model", weights=str(weights))]
    weights.write_bytes(b"2")
    others.append(digest("model", weights=str(weights)))
    with (part.directory / "images.npy").open("ab") as file:
        file.write(b"1")
    others.append(digest("train"))
    assert len({first, *others}) == 5


@pytest.mark.parametrize(
    ("edited", "voids"),
    [
        ("model/backbone.py", True),
        ("training/callbacks.py", True),
        ("data/processed.py", True),
        ("tracking/log.py", False),
        ("gate/judge.py", False),
        ("report/page.py", False),
        ("data/images.py", False),
    ],
)
def test_an_edit_voids_a_checkpoint_only_where_it_decides(
    part: ProcessedSplit, params: Params, tmp_path: Path, edited: str, voids: bool
) -> None:
    code = shutil.copytree(ROOT / "facegender", tmp_path / "code")
    first = inputs_digest(params, [part], code)
    with (code / edited).open("a") as file:
        file.write("# edited\n")
    assert (inputs_digest(params, [part], code) != first) is voids
