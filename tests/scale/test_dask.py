"""Preprocessing on a real Dask cluster: a scheduler and workers on this machine.

Whatever happens to its workers, the bytes are those of a single process, or there is an error.
"""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench.common import make_raw
from bench.outputs import differences, output_digests
from bench.preprocess_cluster import HOST, Cluster, local_cluster
from facegender.data.face_table import find_all_faces, read_faces
from facegender.data.manifest import write_table
from facegender.data.preprocessing import write_split
from facegender.errors import UserError
from facegender.faces.settings import FaceCrop
from facegender.files import file_sha256
from tests.conftest import fill, free_port
from tests.pipeline.conftest import SMALL, Clone, copy_of
from tools.compose_params import ROOT

pytestmark = pytest.mark.scale
distributed = pytest.importorskip("distributed", reason="needs distributed: make install-scale")

IMAGES = 2000
SIZE = 96
HEADER = 128  # bytes of images.npy before its rows
PATIENCE = 20  # seconds, on a machine that may be busy


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with local_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def two_workers(cluster: Cluster) -> Cluster:
    """The cluster, with two workers whatever the tests before this one did to it."""
    while sum(worker.poll() is None for worker in cluster.workers) < 2:
        cluster.start_worker()
    with distributed.Client(cluster.address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=120)
    return cluster


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "raw"


@pytest.fixture(scope="module")
def manifest(raw: Path) -> pd.DataFrame:
    """Images, two of which cannot be decoded."""
    frame = make_raw(raw, IMAGES)
    for row in (3, IMAGES - 1):
        path = raw / frame["path"].iloc[row]
        path.unlink()  # a link to a picture that others have
        path.write_bytes(b"not an image")
        digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
        frame.loc[row, "sha256"] = digest.stdout.split()[0]
    return frame


@pytest.fixture(scope="module")
def alone(manifest: pd.DataFrame, raw: Path) -> Path:
    """The result of a single process."""
    target = raw.with_name("alone")
    failed = write_split(manifest, raw, target, size=SIZE, name="alone", jobs=1)
    assert len(failed) == 2
    return target


def on_cluster(
    cluster: Cluster, manifest: pd.DataFrame, raw: Path, target: Path, patience: float = 300
) -> list[dict[str, str]]:
    return write_split(
        manifest,
        raw,
        target,
        size=SIZE,
        name="cluster",
        scheduler=cluster.address,
        patience=patience,
    )


def assert_same(part: Path, other: Path) -> None:
    for name in ("images.npy", "index.csv"):
        assert (part / name).read_bytes() == (other / name).read_bytes(), name


def rows_done(target: Path) -> int:
    """Return how many rows of an array that is being made are there: no image is black."""
    path = target / "images.npy"
    # Its header comes first, and then all of its rows at once.
    if not path.exists() or path.stat().st_size <= HEADER:
        return 0
    rows = np.memmap(path, np.uint8, "r", offset=HEADER).reshape(-1, SIZE * SIZE * 3)
    return int((rows[:, : SIZE * 3] > 0).any(axis=1).sum())


def when_begun(target: Path, act: Callable[[], None]) -> threading.Thread:
    """Do something when a tenth of the rows is there, from a thread of its own."""

    def wait() -> None:
        while rows_done(target) < IMAGES // 10:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_cluster_makes_the_bytes_of_one_process(
    two_workers: Cluster, manifest: pd.DataFrame, raw: Path, alone: Path, tmp_path: Path
) -> None:
    failed = on_cluster(two_workers, manifest, raw, tmp_path / "part")
    assert [item["path"] for item in failed] == [manifest["path"].iloc[i] for i in (3, IMAGES - 1)]
    assert failed[0]["reason"] == "not an image in a known format"
    assert_same(tmp_path / "part", alone)


def test_a_cluster_finds_and_cuts_out_the_faces_of_one_process(
    two_workers: Cluster, shared: Path, tmp_path: Path
) -> None:
    crop = FaceCrop(margin=0.25, align=True, min_score=0.75, min_size=24)
    folder = shared / "faces" / "male"
    paths = sorted(folder.glob("*.jpg"))[:40]
    manifest = pd.DataFrame(
        {
            "path": [path.name for path in paths],
            "label": 1,
            "sha256": [file_sha256(path) for path in paths],
        }
    )
    made = []
    for name, where in (("here", {"jobs": 1}), ("there", {"scheduler": two_workers.address})):
        write_table(find_all_faces(manifest, folder, crop, **where), tmp_path / f"{name}.csv")
        faces = read_faces(tmp_path / f"{name}.csv")
        options = {"size": SIZE, "name": name, "crop": crop, "faces": faces, **where}
        assert write_split(manifest, folder, tmp_path / name, **options) == []
        made.append((tmp_path / f"{name}.csv").read_bytes())
    assert made[0] == made[1]
    assert_same(tmp_path / "there", tmp_path / "here")


def test_a_worker_that_is_killed_costs_nothing(
    two_workers: Cluster, manifest: pd.DataFrame, raw: Path, alone: Path, tmp_path: Path
) -> None:
    seen: dict[str, int] = {}
    target = tmp_path / "part"
    with distributed.Client(two_workers.address, set_as_default=False) as client:
        pids = client.run(os.getpid)

        def kill() -> None:
            busy: list[str] = []
            while not busy:
                busy = [worker for worker, tasks in client.processing().items() if tasks]
            os.kill(pids[busy[0]], signal.SIGKILL)
            seen["done"] = rows_done(target)

        killer = when_begun(target, kill)
        on_cluster(two_workers, manifest, raw, target)
        killer.join(60)
        assert len(client.nthreads()) == 1
    # In the middle of the work: it had tasks, some rows were there, and others were not.
    assert IMAGES // 10 <= seen["done"] < IMAGES - 2
    assert_same(target, alone)


def test_without_workers_it_ends_with_an_error(
    two_workers: Cluster, manifest: pd.DataFrame, raw: Path, tmp_path: Path
) -> None:
    def kill() -> None:
        for worker in two_workers.workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()

    killer = when_begun(tmp_path / "part", kill)
    with pytest.raises(UserError, match="no worker left"):
        on_cluster(two_workers, manifest, raw, tmp_path / "part", PATIENCE)
    killer.join(60)
    # And none is there for the next.
    with pytest.raises(UserError, match="has had no worker for 2 seconds"):
        on_cluster(two_workers, manifest, raw, tmp_path / "next", 2)


def test_a_scheduler_that_is_silent_is_given_up(
    two_workers: Cluster, manifest: pd.DataFrame, raw: Path, tmp_path: Path
) -> None:
    os.kill(two_workers.scheduler.pid, signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match=r"No Dask scheduler answers at tcp.* within 2 seconds"):
            on_cluster(two_workers, manifest, raw, tmp_path / "part", 2)
    finally:
        os.kill(two_workers.scheduler.pid, signal.SIGCONT)
    nobody = f"tcp://{HOST}:{free_port()}"
    with pytest.raises(UserError, match=f"No Dask scheduler answers at {nobody}"):
        write_split(
            manifest, raw, tmp_path / "p", size=32, name="train", scheduler=nobody, patience=2
        )


def test_a_worker_with_other_code_is_refused(
    two_workers: Cluster, manifest: pd.DataFrame, raw: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(ROOT / "facegender", other / "facegender")
    with (other / "facegender/data/images.py").open("a") as file:
        file.write("# another version\n")
    empty = fill(tmp_path / "empty", {"facegender/__init__.py": ""})
    for code, says in (
        (other, "it has facegender/data/images"),
        (empty, r"A Dask worker has no facegender\.data\.dask_cluster"),
    ):
        worker = two_workers.start_worker(PYTHONPATH=str(code))
        with distributed.Client(two_workers.address, set_as_default=False) as client:
            client.wait_for_workers(3, timeout=120)
        try:
            with pytest.raises(UserError, match=says):
                on_cluster(two_workers, manifest, raw, tmp_path / "part" / code.name)
        finally:
            worker.kill()
            worker.wait()


def test_a_worker_that_sees_other_files_is_refused(
    two_workers: Cluster, manifest: pd.DataFrame, raw: Path, tmp_path: Path
) -> None:
    changed = manifest.copy()
    changed.loc[100, "sha256"] = manifest["sha256"].iloc[101]
    with pytest.raises(UserError, match=r"does not see the raw data: .*: another file is there"):
        on_cluster(two_workers, changed, raw, tmp_path / "part")
    gone = manifest.assign(path="gone/" + manifest["path"])
    with pytest.raises(UserError, match=r"does not see the raw data: .*: No such file"):
        on_cluster(two_workers, gone, raw, tmp_path / "next")


def test_a_task_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    from facegender.data.dask_cluster import run_tasks

    with local_cluster(tmp_path, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0") as fragile:
        fragile.start_worker()
        fragile.start_worker()
        with pytest.raises(UserError, match=r"gave up a task: 1 worker"):
            list(run_tasks([(os._exit, (1,), {})], fragile.address, patience=300))


def test_results_wait_until_the_last_ones_are_written(two_workers: Cluster, tmp_path: Path) -> None:
    from facegender.data.dask_cluster import run_tasks

    tasks = ((Path.touch, (tmp_path / str(i),), {}) for i in range(200))
    results = run_tasks(tasks, two_workers.address, patience=300)
    for _ in range(5):
        next(results)
    time.sleep(2)  # in which workers could do all of it
    begun = len(list(tmp_path.iterdir()))
    # 4 wait here, and 2 for each of 2 threads are at the cluster.
    assert 5 <= begun <= 5 + 4 + 4 + 1
    assert sum(1 for _ in results) == 195
    assert len(list(tmp_path.iterdir())) == 200


def test_dvc_reproduces_the_same_bytes(
    two_workers: Cluster, reproduced: Clone, tmp_path: Path
) -> None:
    clone = copy_of(reproduced, tmp_path)
    here = output_digests(clone.root)["preprocess"]
    lock = (clone.root / "dvc.lock").read_bytes()

    # Where it is done is no reason to do it again.
    clone.compose(*SMALL, "compute.backend=dask", f"compute.scheduler={two_workers.address}")
    assert clone.ran(clone.run("dvc", "repro", "preprocess").stdout) == []
    with distributed.Client(two_workers.address, set_as_default=False) as client:
        # By value, because the scheduler cannot import the tests.
        transitions = lambda dask_scheduler: dask_scheduler.transition_counter  # noqa: E731
        before = client.run_on_scheduler(transitions)
        done = clone.run("dvc", "repro", "--force", "--single-item", "preprocess")
        assert client.run_on_scheduler(transitions) > before
    assert clone.ran(done.stdout) == ["preprocess"]
    there = output_digests(clone.root)["preprocess"]
    assert differences({"preprocess": here}, {"preprocess": there}) == []
    assert (clone.root / "dvc.lock").read_bytes() == lock

    nobody = f"tcp://{HOST}:{free_port()}"
    clone.compose(
        *SMALL, "compute.backend=dask", f"compute.scheduler={nobody}", "compute.patience=2"
    )
    failed = clone.run("dvc", "repro", "-f", "-s", "preprocess", check=False)
    assert failed.returncode != 0
    assert f"error: No Dask scheduler answers at {nobody}" in failed.stderr
    assert "Traceback" not in failed.stderr
