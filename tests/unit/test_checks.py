import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image, ImageEnhance

from facegender.data import checks, similar_pictures
from facegender.data.checks import fingerprint_images
from facegender.data.splits import read_shared_groups
from facegender.errors import UserError
from facegender.evaluation import plots
from stages import split
from tools.compose_params import ROOT


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Soft shapes that no other seed draws."""
    coarse = np.random.default_rng(seed).integers(0, 240, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Twenty different pictures of each label."""
    for place, label in enumerate(("female", "male")):
        folder = tmp_path / "raw" / label
        folder.mkdir(parents=True)
        for number in range(20):
            picture(100 * place + number).save(folder / f"{number:02}.png")
    return tmp_path / "raw"


class Result:
    """Outputs of the stage."""

    def __init__(self, folder: Path) -> None:
        self.summary = json.loads((folder / "splits" / "summary.json").read_text())
        self.dropped = pd.read_csv(folder / "splits" / "dropped.csv")
        self.parts = {
            name: pd.read_csv(folder / "splits" / f"{name}.csv")["path"].tolist()
            for name in ("train", "validation", "test")
        }

    @property
    def all(self) -> set[str]:
        return {path for part in self.parts.values() for path in part}

    def why(self, path: str) -> tuple[str, str]:
        row = self.dropped.set_index("path").loc[path]
        assert path not in self.all
        return row["check"], row["reason"]


@pytest.fixture
def run(raw: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that runs the stage, with changes of its parameters."""

    def start(**changes: object) -> Result:
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        for name, value in changes.items():
            groups = (params["data"], params["data"]["checks"], params["split"], params["image"])
            for group in groups:
                if name in group:
                    group[name] = value
        (raw.parent / "params.yaml").write_text(yaml.safe_dump(params))
        words = ["split", "--params", raw.parent / "params.yaml", "--raw", raw]
        words += ["--splits", raw.parent / "splits", "--plots", raw.parent / "plots"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        # Processes would take longer to start than the few images take.
        monkeypatch.setattr(checks, "fingerprint_images", partial(fingerprint_images, jobs=1))
        # A second for each run; the pipeline's tests look at the figures.
        monkeypatch.setattr(plots, "class_distribution", lambda *_: None)
        split.main()
        return Result(raw.parent)

    return start


def test_good_data_lose_nothing(run: Callable[..., Result]) -> None:
    result = run()
    assert len(result.all) == 40
    assert result.dropped.empty
    found = result.summary["checks"]
    known = [check for check in checks.CHECKS if check not in checks.FACE_CHECKS]
    assert list(found) == known  # the sample is not searched for faces
    assert [item["count"] for item in found.values()] == [0] * len(known)
    assert [item["policy"] for item in found.values()] == ["drop"] * len(known)


def test_the_detector_misses_no_face_in_what_other_checks_leave_out(
    run: Callable[..., Result], raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (raw / "male" / "bad.png").write_bytes(b"text")
    Image.new("RGB", (64, 64)).save(raw / "male" / "black.png")
    missed = {"male/00.png", "male/bad.png", "male/black.png"}

    def find_all_faces(manifest: pd.DataFrame, *_: object, **__: object) -> pd.DataFrame:
        paths = manifest["path"]
        return pd.DataFrame({"path": paths, "faces": (~paths.isin(missed)).astype(int)})

    monkeypatch.setattr(split, "find_all_faces", find_all_faces)
    result = run(face="crop", max_invalid_fraction=0.05)
    assert result.summary["checks"]["no_face"]["count"] == 1
    assert result.summary["faces"]["missed_by_group"]["label"] == {
        "0": {"images": 20, "no_face": 0},
        "1": {"images": 20, "no_face": 1},
    }


BAD = {
    "too_small": (lambda: picture(7, (15, 40)), "15x40 pixels"),
    "extreme_shape": (lambda: picture(7, (200, 40)), "200x40 pixels, more than 4 to 1"),
    "constant": (lambda: Image.new("RGB", (64, 64), (90, 90, 90)), "one colour"),
    "invalid": (None, "not an image"),
}


@pytest.mark.parametrize("check", BAD)
def test_what_shows_no_face_is_dropped_with_a_reason(
    run: Callable[..., Result], raw: Path, check: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = BAD[check]
    bad = raw / "female" / "bad.png"
    make().save(bad) if make else bad.write_bytes(b"text")
    result = run(max_invalid_fraction=0.05)
    assert result.why("female/bad.png")[0] == check
    assert reason in result.why("female/bad.png")[1]
    assert len(result.all) == 40
    assert "female/bad.png" in caplog.text
    if check == "invalid":
        assert [item["path"] for item in result.summary["invalid"]] == ["female/bad.png"]
    else:
        expected = {"policy": "drop", "count": 1, "images": ["female/bad.png"]}
        assert result.summary["checks"][check] == expected


@pytest.mark.parametrize("check", ["too_small", "extreme_shape", "constant"])
def test_a_check_may_fail_instead(run: Callable[..., Result], raw: Path, check: str) -> None:
    BAD[check][0]().save(raw / "female" / "bad.png")
    with pytest.raises(UserError, match=rf"data\.checks\.{check} is fail: 'female/bad\.png'"):
        run(**{check: "fail"})
    assert not (raw.parent / "splits").exists()


def copy_exactly(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def copy_nearly(source: Path, target: Path) -> None:
    with Image.open(source) as image:
        darker = ImageEnhance.Brightness(image).enhance(0.9)
        darker.resize((50, 50)).save(target.with_suffix(".jpg"), quality=80)


@pytest.mark.parametrize(
    ("copy", "name", "check"),
    [(copy_exactly, "copy.png", "exact_duplicates"), (copy_nearly, "copy.jpg", "near_duplicates")],
)
class TestCopies:
    def test_one_is_left(
        self, run: Callable[..., Result], raw: Path, copy: Callable, name: str, check: str
    ) -> None:
        copy(raw / "male" / "03.png", raw / "male" / "copy.png")
        result = run()
        assert result.why(f"male/{name}")[0] == check
        assert "'male/03.png'" in result.why(f"male/{name}")[1]
        assert len(result.all) == 40
        assert result.summary["duplicates"] == 1
        assert result.summary["checks"][check]["count"] == 1

    @pytest.mark.parametrize("seed", range(6))
    def test_or_all_are_kept_in_the_same_part(
        self,
        run: Callable[..., Result],
        raw: Path,
        copy: Callable,
        name: str,
        check: str,
        seed: int,
    ) -> None:
        for number in range(6):
            copy(raw / "male" / f"{number:02}.png", raw / "male" / f"{number:02}-{name}")
        result = run(seed=seed, exact_duplicates="keep", near_duplicates="keep")
        assert len(result.all) == 46
        assert result.dropped.empty
        assert result.summary["checks"][check]["count"] == 6
        lies_in = {path: name for name, paths in result.parts.items() for path in paths}
        groups = read_shared_groups(raw.parent / "splits")
        assert len(groups) == 12
        for number in range(6):
            both = f"male/{number:02}.png", f"male/{number:02}-{name}"
            assert lies_in[both[0]] == lies_in[both[1]]
            assert groups[both[0]] == groups[both[1]]
        assert len(set(groups.values())) == 6

    def test_or_it_fails(
        self, run: Callable[..., Result], raw: Path, copy: Callable, name: str, check: str
    ) -> None:
        copy(raw / "male" / "03.png", raw / "male" / "copy.png")
        with pytest.raises(UserError, match=f"male/{name}"):
            run(**{check: "fail"})

    def test_under_both_labels_it_is_dropped_from_both(
        self, run: Callable[..., Result], raw: Path, copy: Callable, name: str, check: str
    ) -> None:
        copy(raw / "male" / "03.png", raw / "female" / "copy.png")
        result = run()
        assert result.why(f"female/{name}") == (
            "both_labels",
            "is labelled female, and 'male/03.png' is the same picture",
        )
        assert result.why("male/03.png")[0] == "both_labels"
        assert result.summary["under_both_labels"] == [f"female/{name}", "male/03.png"]
        assert len(result.all) == 39
        with pytest.raises(UserError, match=r"both_labels.*male/03\.png"):
            run(both_labels="fail")

    def test_in_train_and_test_it_is_dropped_from_train(
        self, run: Callable[..., Result], raw: Path, copy: Callable, name: str, check: str
    ) -> None:
        (raw / "Training").mkdir()
        for label, place in (("female", 0), ("male", 1)):
            (raw / label).rename(raw / "Training" / label)
            (raw / "Test" / label).mkdir(parents=True)
            for number in range(6):
                picture(1000 + 100 * place + number).save(raw / "Test" / label / f"{number}.png")
        copy(raw / "Training" / "male" / "03.png", raw / "Test" / "male" / "copy.png")
        result = run(predefined=True)
        assert result.why("Training/male/03.png") == (
            "leakage",
            f"is in train, and 'Test/male/{name}' shows the same",
        )
        assert f"Test/male/{name}" in result.parts["test"]
        assert len(result.parts["test"]) == 13
        assert len(result.all) == 52
        with pytest.raises(UserError, match=r"leakage.*Training/male/03\.png"):
            run(predefined=True, leakage="fail")


@pytest.mark.parametrize(("contrast", "kept"), [(8, False), (9, True)])
def test_nine_levels_are_no_longer_one_colour(
    run: Callable[..., Result], raw: Path, contrast: int, kept: bool
) -> None:
    pixels = np.full((64, 64, 3), 90, np.uint8)
    pixels[:, 32:] += np.uint8(contrast)
    Image.fromarray(pixels).save(raw / "female" / "faint.png")
    assert ("female/faint.png" in run().all) == kept


def test_one_wrong_copy_does_not_take_the_others_with_it(
    run: Callable[..., Result], raw: Path
) -> None:
    copy_exactly(raw / "male" / "03.png", raw / "male" / "again.png")
    copy_exactly(raw / "male" / "03.png", raw / "female" / "wrong.png")
    result = run(exact_duplicates="keep")
    assert result.why("female/wrong.png") == (
        "both_labels",
        "is labelled female, and 'male/03.png' is the same picture (as 2 files are)",
    )
    assert {"male/03.png", "male/again.png"} <= result.all
    assert result.summary["under_both_labels"] == ["female/wrong.png"]


def test_a_byte_copy_of_what_is_dropped_is_dropped(run: Callable[..., Result], raw: Path) -> None:
    copy_nearly(raw / "male" / "03.png", raw / "male" / "small.jpg")
    copy_exactly(raw / "male" / "small.jpg", raw / "male" / "small-again.jpg")
    copy_exactly(raw / "male" / "04.png", raw / "male" / "04-again.png")
    result = run(exact_duplicates="keep", near_duplicates="drop")
    for path in ("male/small.jpg", "male/small-again.jpg"):
        assert result.why(path) == ("near_duplicates", "shows nearly what 'male/03.png' shows")
    assert result.summary["checks"]["exact_duplicates"]["images"] == ["male/04.png"]
    assert {"male/03.png", "male/04.png", "male/04-again.png"} <= result.all
    # A copy that is exact and near counts once.
    assert run(exact_duplicates="keep", near_duplicates="keep").summary["duplicates"] == 3


def test_a_picture_that_was_not_compared_with_all_is_named(
    run: Callable[..., Result],
    raw: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert run().summary["not_all_compared"] == {"count": 0, "images": []}
    for size in (60, 48):
        Image.open(raw / "male" / "03.png").resize((size, size)).save(raw / "male" / f"{size}.png")
    monkeypatch.setattr(similar_pictures, "MOST", 1)
    # All that these three resemble is compared, because each copy that is found counts no more.
    assert run().summary["not_all_compared"] == {"count": 0, "images": []}
    for least in ("MIN_GREY", "MIN_COLOUR", "MIN_REFINED"):
        monkeypatch.setattr(similar_pictures, least, 0.2)
    found = run().summary["not_all_compared"]
    every = {path.relative_to(raw).as_posix() for path in raw.rglob("*.png")}
    assert (found["count"], len(every)) == (42, 42)
    assert set(found["images"]) < every
    assert "42 image(s) resemble more than 8 others" in caplog.text


def test_checks_that_leave_out_too_much_stop_the_stage(
    run: Callable[..., Result], raw: Path
) -> None:
    for number in range(10):
        copy_exactly(raw / "male" / f"{number:02}.png", raw / "male" / f"{number:02}-again.png")
    assert len(run(max_dropped_fraction=0.2).all) == 40
    with pytest.raises(UserError, match=r"10 of 50 images.*0\.19 allows: exact_duplicates 10\."):
        run(max_dropped_fraction=0.19)


def test_of_copies_the_largest_is_kept(run: Callable[..., Result], raw: Path) -> None:
    with Image.open(raw / "male" / "03.png") as image:
        image.resize((128, 128), Image.Resampling.BICUBIC).save(raw / "male" / "z-large.png")
    result = run()
    assert result.why("male/03.png")[0] == "near_duplicates"
    assert "male/z-large.png" in result.all


def test_too_few_of_a_class_say_where_they_went(run: Callable[..., Result], raw: Path) -> None:
    for path in (raw / "male").iterdir():
        path.write_bytes(b"?")
    with pytest.raises(UserError, match=r"0 usable image\(s\) are labelled male.*invalid 20"):
        run()
    with pytest.raises(UserError, match=r"20 usable.*female.*min_per_class is 21"):
        run(min_per_class=21)


def test_the_balance_is_set_beside_the_studys(
    run: Callable[..., Result], raw: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for number in range(10):
        (raw / "female" / f"{number:02}.png").unlink()
    balance = run().summary["balance"]
    assert balance["train"] | balance["test"] == {
        "images": 9,
        "female": 0.3333,
        "study_images": 1102,
        "study_female": 0.3158,
    }
    assert (balance["train"]["images"], balance["train"]["study_images"]) == (21, 2583)
    assert "train and validation: 21 images, 33.3 % female (the study's: 2583, 47" in caplog.text
    assert "test: 9 images" in caplog.text


def test_a_file_that_cannot_be_read_is_named(
    run: Callable[..., Result], raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root reads what it has no permission for, so refuse it here. Once is enough: files without a
    # digest would be taken for copies of each other.
    path_open, errors = Path.open, [PermissionError(13, "Permission denied")]

    def refuse(self: Path, *args: object, **kwargs: object) -> object:
        if self.name == "03.png" and self.parent.name == "male" and errors:
            raise errors.pop()
        return path_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"male/03\.png' cannot be read: Permission denied"):
        run()


def test_the_images_of_a_subject_are_listed_together(run: Callable[..., Result], raw: Path) -> None:
    rows = ["file,person", *(f"female/{number:02}.png,{number // 2}" for number in range(4))]
    (raw / "people.csv").write_text("\n".join(rows))
    run(group_by="person")
    names = read_shared_groups(raw.parent / "splits")
    assert names == {f"female/{number:02}.png": f"subject {number // 2}" for number in range(4)}
    run()
    assert read_shared_groups(raw.parent / "splits") == {}


def test_images_without_a_subject_and_of_the_largest_are_counted(
    run: Callable[..., Result], raw: Path
) -> None:
    rows = ["file,person", *(f"female/{number:02}.png,unknown" for number in range(5))]
    (raw / "people.csv").write_text("\n".join(rows))
    (raw / "female" / "copy.png").write_bytes((raw / "female" / "19.png").read_bytes())
    summary = run(group_by="person").summary
    assert (summary["without_subject"], summary["largest_subject"]) == (35, 5)
    assert not {"without_subject", "largest_subject"} & run().summary.keys()


def test_the_result_is_independent_of_names(run: Callable[..., Result], raw: Path) -> None:
    for number in range(4):
        copy_nearly(raw / "male" / f"{number:02}.png", raw / "male" / f"{number:02}-copy.jpg")
    pictures = {path: (raw / path).read_bytes() for path in run().all}
    parts = [{pictures[path] for path in part} for part in run().parts.values()]
    for label in ("female", "male"):
        for number, path in enumerate(sorted((raw / label).iterdir(), reverse=True)):
            path.rename(path.with_name(f"renamed-{number:02}{path.suffix}"))
    result = run()
    again = [{(raw / path).read_bytes() for path in part} for part in result.parts.values()]
    assert again == parts
