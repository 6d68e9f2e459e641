"""What `facegender score` does before Spark starts and in its workers; more in tests/scale."""

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from facegender.batch_scoring import parquet, plan, spark_session, tasks
from facegender.batch_scoring import score as score_module
from facegender.batch_scoring import storage as storage_module
from facegender.batch_scoring.plan import Job
from facegender.batch_scoring.storage import Storage, storage_of
from facegender.cli.main import _run
from facegender.data.image_files import find_images, walk_images
from facegender.data.images import InvalidImage, decode_image, encode_png
from facegender.errors import UserError
from facegender.tracking import registry
from tests.conftest import fill
from tests.unit.conftest import Store

MODEL = "models:/facegender/1"


def photos(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:03}.jpg").write_bytes(b"x")
    return folder


def prepare(source: Path | str, output: Path | str, **changes: object) -> Job:
    settings = {"model": MODEL, "abstain_below": 0.5, "part_images": 10} | changes
    return plan.prepare(str(source), str(output), **settings)


def planned(output: Path) -> list[list]:
    return [json.loads(path.read_text()) for path in sorted((output / "_score/plan").iterdir())]


def flat(parts: list[list]) -> list:
    return [item for part in parts for item in part]


def test_what_is_passed_over_beside_photos_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    source = photos(tmp_path / "in", 3)
    for name in ("raw.cr2", "more.parquet"):
        (source / name).write_bytes(b"II*\0")
    assert prepare(source, tmp_path / "out").images == 3
    assert f"skipped 2 in {source}, not image files: 'more.parquet', " in caplog.text


def test_the_plan_has_each_image_once(tmp_path: Path) -> None:
    source = photos(tmp_path / "in" / "deep", 25).parent
    photos(tmp_path / "in" / ".hidden", 1)
    job = prepare(source, tmp_path / "out")
    assert job == Job(str(source), False, MODEL, 0.5, parts=3, images=25)
    parts = planned(tmp_path / "out")
    assert [len(part) for part in parts] == [10, 10, 5]
    assert sorted(flat(parts)) == [f"deep/{number:03}.jpg" for number in range(25)]


def test_a_plan_that_is_written_down_is_kept(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 25)
    job = prepare(source, tmp_path / "out")
    (source / "another.jpg").write_bytes(b"x")
    assert prepare(source, tmp_path / "out", part_images=1) == job
    assert len(flat(planned(tmp_path / "out"))) == 25


@pytest.mark.parametrize("first_plan", [False, True])
def test_a_resumed_run_names_images_as_the_first_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_plan: bool
) -> None:
    photos(tmp_path / "in", 3)
    monkeypatch.chdir(tmp_path)
    prepare("in/", "out")
    if first_plan:  # of a version that did not keep INPUT as it was given
        path = tmp_path / "out/_score/job.json"
        known = json.loads(path.read_text())
        del known["written"]
        path.write_text(json.dumps(known))
    used: list[Storage] = []
    monkeypatch.setattr(score_module, "spark_session", lambda master, conf: nullcontext())
    monkeypatch.setattr(score_module, "wait_with_progress", lambda rows, session, total: [])

    def record(session: object, job: Job, source: Storage, *_: object, **__: object) -> object:
        used.append(source)
        return SimpleNamespace(collect=list)

    monkeypatch.setattr(score_module, "scored_parts", record)
    job = prepare(tmp_path / "in", "out")
    options = {"model": tmp_path, "size": 8, "crop": None, "master": "local", "conf": {}}
    score_module.score(job, "out", **options)
    assert used[0].photo("000.jpg") == tmp_path / "in/000.jpg"
    expected = tmp_path / "in/000.jpg" if first_plan else "in/000.jpg"
    assert used[0].address("000.jpg") == str(expected)


def test_an_incomplete_plan_is_made_again(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 25)
    prepare(source, tmp_path / "out")
    (tmp_path / "out/_score/job.json").unlink()
    assert prepare(source, tmp_path / "out", part_images=25).parts == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "models:/facegender/2"}, "models:/facegender/1 there, models:/facegender/2 now"),
        ({"abstain_below": 0.9}, "abstain_below 0.5 there, 0.9 now"),
    ],
)
def test_another_job_is_not_mixed_in(tmp_path: Path, changes: dict, named: str) -> None:
    source = photos(tmp_path / "in", 3)
    prepare(source, tmp_path / "out")
    with pytest.raises(UserError, match="belongs to another job") as error:
        prepare(source, tmp_path / "out", **changes)
    assert named in str(error.value)
    with pytest.raises(UserError, match="belongs to another job"):
        prepare(photos(tmp_path / "other", 3), tmp_path / "out")


def test_what_is_there_is_not_written_into(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 3)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"OUTPUT exists: .* is a file"):
        prepare(source, tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"OUTPUT exists: .* is not empty"):
        prepare(source, tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["thesis.txt"]


def test_nothing_to_score_leaves_no_output(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no INPUT"):
        prepare(tmp_path / "none", tmp_path / "out")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("no photo")
    with pytest.raises(UserError, match="INPUT is empty: there is no image"):
        prepare(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match=r"notes.txt is not a readable Parquet file"):
        prepare(tmp_path / "in" / "notes.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rows_of(output: Path) -> list[tuple]:
    return [row for part in planned(output) for row in parquet.table_rows(*part)]


@pytest.mark.parametrize("row_group_size", [3, 20, 1000])
def test_rows_of_parquet_are_read_once_whatever_its_row_groups(
    tmp_path: Path, row_group_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    contents = [str(number).encode() for number in range(200)]
    table = pa.table({"path": [f"{number}.jpg" for number in range(200)], "content": contents})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=row_group_size)
    job = prepare(tmp_path / "in.parquet", tmp_path / "out", part_images=50)
    assert (job.table, job.images, caplog.text) == (True, 200, "")
    expected = [(f"{number}.jpg", str(number).encode()) for number in range(200)]
    assert rows_of(tmp_path / "out") == expected


@pytest.mark.parametrize("row_group_size", [50, 1000])
def test_rows_that_were_removed_since_the_plan_are_not_left_out_in_silence(
    tmp_path: Path, row_group_size: int
) -> None:
    for rows in (200, 120):
        table = pa.table({"content": [b"x"] * rows})
        pq.write_table(table, tmp_path / "in.parquet", row_group_size=row_group_size)
        assert prepare(tmp_path / "in.parquet", tmp_path / "out", part_images=50).images == 200
    with pytest.raises(UserError, match="fewer rows than this job was planned with"):
        rows_of(tmp_path / "out")


def test_parquet_of_hugging_face_and_rows_without_a_name_or_bytes(tmp_path: Path) -> None:
    images = [{"bytes": b"a", "path": "a.jpg"}, {"bytes": b"b", "path": None}, {"bytes": None}]
    folder = tmp_path / "in" / "split=test" / "faces.parquet"  # as Spark writes a table
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"image": images, "label": [0, 1, 0]}), folder / "0.parquet")
    (tmp_path / "in" / "_SUCCESS").touch()
    assert prepare(tmp_path / "in", tmp_path / "out").images == 3
    (first, second, (name, error)) = rows_of(tmp_path / "out")
    assert first == ("a.jpg", b"a")
    assert second == (f"{folder}/0.parquet#1", b"b")
    assert name == f"{folder}/0.parquet#2"
    assert isinstance(error, InvalidImage)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_names_and_bytes_are_read_in_any_form_that_programs_write(
    tmp_path: Path, kind: str
) -> None:
    names = pa.array(["a.jpg", "b.jpg"])
    names = names.dictionary_encode() if kind == "dictionary" else names.cast(kind)
    contents = pa.array([b"a", b"b"], pa.binary_view() if kind == "string_view" else pa.binary())
    pq.write_table(pa.table({"path": names, "content": contents}), tmp_path / "in.parquet")
    prepare(tmp_path / "in.parquet", tmp_path / "out")
    assert rows_of(tmp_path / "out") == [("a.jpg", b"a"), ("b.jpg", b"b")]


def test_parquet_must_have_one_column_of_bytes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [b""], "b": [b""]}), tmp_path / "two.parquet")
    with pytest.raises(UserError, match=r"has 2 columns of bytes \(a, b\)"):
        prepare(tmp_path / "two.parquet", tmp_path / "out")
    pq.write_table(pa.table({"a": ["text"]}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match=r"has 0 columns of bytes \(none\).*Its columns: a"):
        prepare(tmp_path / "none.parquet", tmp_path / "out")


def test_the_model_sees_the_pixels_that_predict_sees() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    ((content, error, _, _),) = tasks._decode(encode_png(pixels), 32, None)
    assert error is None
    expected = decode_image(encode_png(pixels), 32)
    np.testing.assert_array_equal(decode_image(content, 32), expected)


def test_names_that_are_no_text_are_escaped(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        photos(tmp_path / "in", 1).joinpath(name).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes only text")
    prepare(tmp_path / "in", tmp_path / "out")
    assert planned(tmp_path / "out") == [["000.jpg", name]]
    assert tasks._as_text(name) == r"caf\udce9.jpg"


def test_images_are_walked_as_they_are_found(tmp_path: Path) -> None:
    names = ("b/1.jpg", "a/2.JPG", "a-b/3.png", "a/b/4.webp")
    others = ("__MACOSX/5.jpg", "a/.6.jpg", ".x/7.jpg", "notes.txt")
    fill(tmp_path, dict.fromkeys((*names, *others), ""))
    (tmp_path / "a/folder.jpg").mkdir()
    walked = list(walk_images(tmp_path))
    assert find_images(tmp_path) == sorted(walked, key=str)
    assert {str(path) for path in walked} == set(names)
    assert all(isinstance(path, PurePosixPath) for path in walked)


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = storage_of(str(tmp_path))
    folder.write("a", b"before")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        folder.write("a", b"after")
    assert folder.read("a") == b"before"
    assert list(folder.names()) == ["a"]


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = photos(tmp_path / "in", 1)

    def refuse(self: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(UserError, match=r"Cannot use .*/out/_score/plan: Permission denied"),
        storage_module.storage_errors_as_user_errors(),
    ):
        prepare(source, tmp_path / "out")


def test_a_folder_that_cannot_be_read_ends_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hidden one does not: its photos would be passed over."""
    source = photos(tmp_path / "in", 1)
    closed = {str(photos(source / "closed", 1)), str(photos(source / ".Trashes", 1))}

    def scandir(path: str) -> Iterator[os.DirEntry[str]]:
        if path in closed:
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    scan = os.scandir
    monkeypatch.setattr("os.scandir", scandir)
    with (
        pytest.raises(UserError, match=r"Cannot use .*/in/closed: Permission denied"),
        storage_module.storage_errors_as_user_errors(),
    ):
        prepare(source, tmp_path / "out")
    closed.remove(str(source / "closed"))
    assert prepare(source, tmp_path / "out").images == 2


def test_an_alias_becomes_its_version(store: Store) -> None:
    with pytest.raises(UserError, match="no models:/facegender@champion"):
        registry.pin_version("models:/facegender@champion")
    run = registry.mlflow.get_run(store.runs["good"])
    judge = lambda candidate, champion: registry.Verdict(True, "fit")  # noqa: E731
    registry.promote(run, judge, lock=store.root / "lock")
    assert registry.pin_version("models:/facegender@champion") == "models:/facegender/1"
    assert registry.pin_version("models:/facegender/1") == "models:/facegender/1"
    assert registry.pin_version(f"runs:/{store.runs['good']}/model").startswith("runs:/")


def test_there_is_no_champion_to_score_by(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spark_session, "check_spark", lambda: None)
    with pytest.raises(UserError, match="no models:/facegender@champion"):
        _run(["score", str(photos(tmp_path / "in", 1)), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", ["model.tflite", "."])
def test_what_is_not_a_logged_model_is_named_and_leaves_no_output(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.setattr(spark_session, "check_spark", lambda: None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.tflite").write_bytes(b"x")
    model = str(tmp_path / "model" / named)
    with pytest.raises(UserError, match=r"did not log the model, or its files are lost"):
        _run(["score", str(photos(tmp_path / "in", 1)), str(tmp_path / "out"), "--model", model])
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pyspark", None)
        with pytest.raises(UserError, match=r"pip install 'facegender\[spark\]'"):
            _run(["score", "in", "out"])
    monkeypatch.setitem(sys.modules, "pyspark", shutil)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(UserError, match="There is no Java on PATH"):
        _run(["score", "in", "out"])
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(UserError, match="There is no Java in JAVA_HOME"):
        _run(["score", "in", "out"])


@pytest.mark.parametrize("scheme", ["s3", "s3a", "s3n"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_all_forms_of_an_s3_address_are_one_folder(scheme: str, slash: str) -> None:
    pytest.importorskip("s3fs", reason="needs s3fs: make install-scale")
    storage = storage_of(f"{scheme}://bucket/photos{slash}")
    assert storage.url == "s3://bucket/photos"
    assert storage.address("a.jpg") == f"{scheme}://bucket/photos/a.jpg"


def test_parquet_on_s3_is_read_and_resumed_under_any_form_of_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs", reason="needs s3fs: make install-scale")
    moto = pytest.importorskip("moto.server")
    monkeypatch.setattr(
        storage_module, "_filesystem", lru_cache(storage_module._filesystem.__wrapped__)
    )
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        storage_module._filesystem("s3").mkdir("bucket")
        stored = storage_of("s3://bucket/in")
        contents = [b"a", b"b", None]
        buffer = io.BytesIO()
        pq.write_table(pa.table({"path": ["1", "2", "3"], "bytes": contents}), buffer)
        stored.write("deep/photos.parquet", buffer.getvalue())
        stored.write("_temporary/photos.parquet", b"not to be read")
        job = prepare("s3a://bucket/in/", tmp_path / "out", part_images=2)
        assert (job.table, job.images, job.parts) == (True, 3, 2)
        assert prepare("s3://bucket/in", tmp_path / "out", part_images=2) == job
        target = storage_of(str(tmp_path / "out"))
        rows = [row for part in (0, 1) for row in parquet.table_rows(*plan.read_part(target, part))]
    finally:
        server.stop()
    assert [name for name, _ in rows] == ["1", "2", "3"]
    assert [image for _, image in rows[:2]] == [b"a", b"b"]
    assert isinstance(rows[2][1], InvalidImage)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "INPUT or OUTPUT is empty"),
        ("s3://", "not an address in object storage"),
        ("s3://key:secret@bucket/x", "not an address in object storage"),
        ("https://host/x", r"https:// is not supported\. Use a path or one of s3://"),
        ("az://container/x", "The package that reads az:// is missing: `pip install adlfs`"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused(
    monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(UserError, match=message):
        storage_of(address)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """An empty folder in object storage, which fsspec keeps in memory."""
    monkeypatch.setitem(storage_module._SCHEMES, "memory", ("memory", ""))
    yield storage_of("memory://bucket/in")
    storage_module._filesystem("memory").rm("/bucket", recursive=True)


def test_photos_in_object_storage_are_planned_and_read(
    remote: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for name in ("a/1.jpg", "2.png", "notes.txt", "__MACOSX/3.jpg"):
        remote.write(name, name.encode())
    storage_of("memory://bucket/into").write("4.jpg", b"")
    address = "memory://bucket/in"
    output = storage_of("memory://bucket/out")
    job = prepare(f"{address}/", output.written)
    assert f"skipped 1 in {address}, not image files: 'notes.txt'" in caplog.text
    assert job == Job(address, False, MODEL, 0.5, parts=1, images=2)
    # Without the slash it is the same job.
    assert prepare(address, output.written) == job
    names = plan.read_part(output, 0)
    assert sorted(names) == ["2.png", "a/1.jpg"]
    assert dict(tasks._stored_images(remote, names)) == {
        f"{address}/{name}": name.encode() for name in names
    }
    ((name, error),) = tasks._stored_images(remote, ["none.jpg"])
    assert (name, str(error)) == (f"{address}/none.jpg", "no such file")
    assert set(output.names()) == {"_score"}
    with pytest.raises(FileNotFoundError):
        output.read("none")
    assert list(storage_of("memory://bucket/none").names()) == []


def test_parquet_in_object_storage(remote: Storage, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"content": [b"a", b"b"]}), buffer)
    for name in ("x/1.parquet", "_temporary/2.parquet"):
        remote.write(name, buffer.getvalue())
    for source in (remote.written, f"{remote.written}/x/1.parquet"):
        output = tmp_path / source.replace("/", "-")
        job = prepare(source, output)
        assert (job.table, job.images) == (True, 2)
        table = "memory://bucket/in/x/1.parquet"
        assert rows_of(output) == [(f"{table}#0", b"a"), (f"{table}#1", b"b")]


def test_an_object_too_large_for_an_image_is_not_held(
    remote: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "MAX_IMAGE_BYTES", 3)
    remote.write("fits.jpg", b"abc")
    remote.write("large.jpg", b"abcd")
    remote.write("empty.jpg", b"")
    assert remote.photo("fits.jpg") == b"abc"
    assert remote.photo("empty.jpg") == b""
    with pytest.raises(InvalidImage, match="too large: more than 3 bytes"):
        remote.photo("large.jpg")


@pytest.mark.parametrize(
    "option", [["--part-images", "0"], ["--conf", "x"], ["--abstain-below", "2"]]
)
def test_options_are_checked(option: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        _run(["score", "in", "out", *option])
