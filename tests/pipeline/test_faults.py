"""Bad luck: the pipeline killed, interrupted, out of disk, or without its MLflow server.

After each of these, plain `dvc repro` makes the bytes that it makes undisturbed. `make campaign`
has the long form of the kills.
"""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest
import yaml

from bench.faults import kill_repro, start_repro
from bench.outputs import differences, output_digests
from tests.pipeline.conftest import EPOCHS, HOST, Clone, copy_of, files, served

pytestmark = pytest.mark.slow


def before(clone: Clone, stage: str, folder: Path) -> Clone:
    """Return a copy as it was before a stage ran for the first time."""
    copied = copy_of(clone, folder)
    path = copied.root / "dvc.lock"
    lock = yaml.safe_load(path.read_text())
    stages = list(lock["stages"])
    for name in stages[stages.index(stage) :]:
        for out in lock["stages"].pop(name)["outs"]:
            place = copied.root / out["path"]
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    path.write_text(yaml.safe_dump(lock, sort_keys=False))
    for name in (".dvc/cache/runs", "mlruns"):
        shutil.rmtree(copied.root / name)
    (copied.root / "mlflow.db").unlink()
    return copied


def assert_same(clone: Clone, reference: Clone, *stages: str) -> None:
    expected, found = output_digests(reference.root), output_digests(clone.root)
    if stages:
        expected = {stage: expected[stage] for stage in stages}
        found = {stage: found[stage] for stage in stages}
    assert differences(expected, found) == []
    assert all(expected.values())


def printed(clone: Clone) -> str:
    return clone.root.with_name(f"{clone.root.name}.log").read_text()


def checkpoints(clone: Clone) -> list[int]:
    """Return when each checkpoint was written."""
    return [path.stat().st_mtime_ns for path in (clone.root / ".dvc/tmp/facegender").glob("*.npz")]


def train_until_an_epoch_is_kept(clone: Clone, **env: str) -> subprocess.Popen:
    """Start the training, and return when one more epoch is in a checkpoint."""
    before = checkpoints(clone)
    dvc = start_repro(clone.root, "train", **env)
    while checkpoints(clone) == before:
        assert dvc.poll() is None, printed(clone)
        time.sleep(0.01)
    return dvc


def steps_of(run: mlflow.entities.Run, client: mlflow.MlflowClient) -> list[int]:
    return sorted(point.step for point in client.get_metric_history(run.info.run_id, "val_loss"))


@pytest.mark.parametrize(
    ("stage", "seconds", "everything"),
    [
        pytest.param("preprocess", 1.0, True, id="preprocess"),
        pytest.param("evaluate", 3.0, False, id="evaluate", marks=pytest.mark.campaign),
    ],
)
def test_a_stage_that_is_killed_is_done_again(
    reproduced: Clone, tmp_path: Path, stage: str, seconds: float, everything: bool
) -> None:
    clone = before(reproduced, stage, tmp_path)
    assert kill_repro(clone.root, stage, seconds, everything=everything)
    clone.run("dvc", "repro", stage)
    assert_same(clone, reproduced, stage)


def test_a_training_goes_on_where_it_was_stopped(reproduced: Clone, tmp_path: Path) -> None:
    clone = before(reproduced, "train", tmp_path)
    for number in (signal.SIGKILL, signal.SIGINT):
        dvc = train_until_an_epoch_is_kept(clone)
        os.killpg(dvc.pid, number)
        assert dvc.wait() != 0
    assert printed(clone).count("training goes on after epoch") == 1
    assert printed(clone).count("interrupted; `dvc repro` continues") == 1
    assert "Traceback" not in printed(clone)
    done = clone.run("dvc", "repro", "train")
    assert "training goes on after epoch" in done.stdout + done.stderr
    assert_same(clone, reproduced, "train")
    assert list((clone.root / ".dvc/tmp/facegender").glob("*.npz")) == []
    client = mlflow.MlflowClient(f"sqlite:///{clone.root / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("facegender").experiment_id])
    assert run.info.status == "FINISHED"
    assert steps_of(run, client) == list(range(1, EPOCHS + 1))


@pytest.mark.parametrize(
    ("stage", "room"),
    [("preprocess", 100_000), pytest.param("train", 2_000_000, marks=pytest.mark.campaign)],
)
def test_a_full_disk_loses_nothing(
    reproduced: Clone, tmp_path: Path, stage: str, room: int
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        clone = before(reproduced, stage, disk)
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(bytes(free - room))
        done = clone.run("dvc", "repro", stage, check=False)
        assert done.returncode != 0
        assert "disk is full" in done.stderr or "No space left" in done.stderr
        assert "Traceback" not in done.stderr
        (disk / "filler").unlink()
        clone.run("dvc", "repro", stage)
        assert_same(clone, reproduced, stage)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize(
    ("lock", "says", "stages"),
    [
        pytest.param(
            "dvc.lock", "validation failed", ("download", "split", "preprocess"), id="preprocess"
        ),
        pytest.param("dvc.lock", "validation failed", (), marks=pytest.mark.campaign, id="all"),
        pytest.param(".dvc/tmp/rwlock", "Unable to read RWLock-file", (), id="rwlock"),
    ],
)
def test_dvcs_own_lock_cut_short_needs_one_command(
    reproduced: Clone, tmp_path: Path, lock: str, says: str, stages: tuple[str, ...]
) -> None:
    clone = copy_of(reproduced, tmp_path)
    # The state after a kill at the moment when DVC writes the file.
    (clone.root / lock).write_text("")
    stopped = clone.run("dvc", "repro", check=False)
    assert stopped.returncode != 0
    assert says in stopped.stderr
    (clone.root / lock).unlink()
    clone.run("dvc", "repro", *stages[-1:])
    assert_same(clone, reproduced, *stages)


class Server:
    """A real MLflow server behind a gate that can be shut, or go silent, and that takes its time.

    Attributes:
        mode: open, shut or silent.
    """

    def __init__(self, port: int) -> None:
        self.address = f"http://{HOST}:{port}"
        self.mode = "open"
        self.earlier: set[str] = set()
        outer = self

        class Gate(BaseHTTPRequestHandler):
            def forward(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if outer.mode == "silent":
                    time.sleep(10)
                if outer.mode != "open":
                    self.close_connection = True
                    return
                time.sleep(0.05)
                request = urllib.request.Request(
                    outer.address + self.path, content or None, method=self.command
                )
                for name in ("Content-Type", "Authorization"):
                    if name in self.headers:
                        request.add_header(name, self.headers[name])
                try:
                    answer = urllib.request.urlopen(request)
                except urllib.error.HTTPError as error:
                    answer = error
                body = answer.read()
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "text/plain"))
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

            def log_message(self, *_: object) -> None:
                pass

        self.gate = ThreadingHTTPServer((HOST, 0), Gate)
        threading.Thread(target=self.gate.serve_forever, daemon=True).start()
        self.uri = f"http://{HOST}:{self.gate.server_port}"

    def runs(self) -> list[mlflow.entities.Run]:
        """Return those of this test."""
        client = self.client()
        experiment = client.get_experiment_by_name("facegender")
        if experiment is None:
            return []
        runs = client.search_runs([experiment.experiment_id])
        return [run for run in runs if run.info.run_id not in self.earlier]

    def forget(self) -> None:
        """Begin another test."""
        self.mode = "open"
        self.earlier |= {run.info.run_id for run in self.runs()}

    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.address)


@pytest.fixture(scope="module")
def started_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = Clone(tmp_path_factory.mktemp("server"))
    command = (
        *("mlflow", "server", "--backend-store-uri", f"sqlite:///{place.root / 'server.db'}"),
        *("--artifacts-destination", str(place.root / "artifacts")),
    )
    with served(place, command, place.root / "log") as port:
        server = Server(port)
        yield server
        server.gate.shutdown()


@pytest.fixture
def server(started_server: Server) -> Server:
    started_server.forget()
    return started_server


def on_server(server: Server) -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": server.uri,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    }


def assert_complete(server: Server) -> None:
    (run,) = server.runs()
    assert run.info.status == "FINISHED"
    assert steps_of(run, server.client()) == list(range(1, EPOCHS + 1))
    assert {"test_accuracy", "calibration_slope", "export_n"} <= run.data.metrics.keys()


@pytest.fixture(scope="module")
def unheard(started_server: Server, new_clone: Callable[..., Clone]) -> tuple[Clone, str]:
    """A new clone that ran the pipeline beside a silent server, and what it printed."""
    clone = new_clone()
    started_server.forget()
    started_server.mode = "silent"
    done = clone.run("dvc", "repro", **on_server(started_server))
    assert started_server.runs() == []
    return clone, done.stderr


def test_two_clones_give_the_same_bytes(reproduced: Clone, unheard: tuple[Clone, str]) -> None:
    other, _ = unheard
    for folder in ("metrics", "models", "data", "docs"):
        one, two = files(reproduced.root / folder), files(other.root / folder)
        # Times and run ids differ from run to run, and are in separate files.
        for expected in ("speed.csv", "export.json", "run.json", "evaluation_run.json"):
            assert one.pop(expected, None) != two.pop(expected, "absent")
        assert one == two
        assert one
    exports = [
        json.loads((clone.root / "metrics/export.json").read_text())
        for clone in (reproduced, other)
    ]
    for export in exports:
        for kind in ("float32", "int8"):
            assert export[kind].pop("latency_ms") > 0
    assert exports[0] == exports[1]


def test_a_server_that_is_silent_gets_the_run_later(
    reproduced: Clone, unheard: tuple[Clone, str], server: Server
) -> None:
    clone, stderr = unheard
    assert "does not answer" in stderr
    assert "dvc repro --force --single-item evaluate report" in stderr
    assert_same(clone, reproduced)
    local = mlflow.MlflowClient(f"sqlite:///{clone.root / 'mlflow.db'}")
    (run,) = local.search_runs([local.get_experiment_by_name("facegender").experiment_id])
    assert "test_accuracy" in run.data.metrics
    send = ("dvc", "repro", "--force", "--single-item", "evaluate", "report")
    clone.run(*send, **on_server(server))
    assert_complete(server)
    assert_same(clone, reproduced)


@pytest.mark.campaign  # in short: test_tracking.py, without the pipeline
def test_a_server_that_dies_in_mid_training_gets_the_rest_later(
    reproduced: Clone, tmp_path: Path, server: Server
) -> None:
    clone = before(reproduced, "train", tmp_path)
    dvc = train_until_an_epoch_is_kept(clone, **on_server(server))
    server.mode = "shut"
    assert dvc.wait() == 0, printed(clone)
    assert "the rest of this stage is not logged" in printed(clone)
    assert_same(clone, reproduced, "train")
    server.mode = "open"
    (run,) = server.runs()
    assert len(steps_of(run, server.client())) < EPOCHS
    clone.run("dvc", "repro", **on_server(server))
    assert_complete(server)
    assert_same(clone, reproduced)
