import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from facegender.data.processed import ProcessedSplit
from facegender.errors import UserError
from facegender.runtime.dvc_context import worker_wait
from facegender.training.rendezvous import (
    TrainingJob,
    WorkerGroup,
    accept_workers,
    join_chief,
    read_worker_group,
    require_chief,
)
from tests.conftest import free_port

HOST = "127.0.0.1"


def tf_config(workers: Any = ("a:1", "b:2"), index: Any = 0, **more: Any) -> str:
    task = {"type": "worker", "index": index}
    return json.dumps({"cluster": {"worker": list(workers)}, "task": task} | more)


def test_tf_config_names_the_workers_and_this_one() -> None:
    cluster = read_worker_group(tf_config(["10.0.0.1:2222", "[::1]:22"], 1))
    assert cluster == WorkerGroup(("10.0.0.1:2222", "[::1]:22"), 1)
    assert cluster.chief == ("10.0.0.1", 2222)
    assert WorkerGroup(("[::1]:22",), 0).chief == ("::1", 22)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "needs TF_CONFIG"),
        ("", "needs TF_CONFIG"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"cluster": {}}', "cannot be read"),
        (tf_config(["a", "b:2"]), "cannot be read"),
        (tf_config([":1", "b:2"]), "an address has no port"),
        (tf_config(["a:1", "b:70000"]), "an address has no port"),
        (tf_config(["a:1"]), "fewer than two"),
        (tf_config(["a:1", "a:1"]), "twice"),
        (tf_config(index=2), "task.index"),
        (tf_config(index="0"), "task.index"),
        (tf_config(index=True), "task.index"),
        (tf_config(task={"type": "ps", "index": 0}), "other jobs"),
        (tf_config(cluster={"worker": ["a:1", "b:2"], "ps": ["c:3"]}), "other jobs"),
    ],
)
def test_a_bad_tf_config_is_told_with_an_example(text: str | None, fault: str) -> None:
    with pytest.raises(UserError, match=f"{fault}.*TF_CONFIG='"):
        read_worker_group(text)


def test_the_pipeline_is_for_worker_0() -> None:
    require_chief(WorkerGroup(("a:1", "b:2"), 0))
    with pytest.raises(UserError, match="facegender worker"):
        require_chief(WorkerGroup(("a:1", "b:2"), 1))


@pytest.mark.parametrize("text", ["0", "-1", "soon", "1.5"])
def test_the_wait_is_a_number_of_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FACEGENDER_WORKER_WAIT", raising=False)
    assert worker_wait() == 900
    monkeypatch.setenv("FACEGENDER_WORKER_WAIT", text)
    with pytest.raises(UserError, match="FACEGENDER_WORKER_WAIT"):
        worker_wait()


@pytest.fixture
def workers() -> tuple[str, ...]:
    return (f"{HOST}:{free_port()}", f"{HOST}:1", f"{HOST}:2")


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """Call each in a thread of its own; an exception is its result."""
    pool = ThreadPoolExecutor(len(calls))  # leaving a `with` would wait for a thread that hangs
    futures = [pool.submit(call) for call in calls]
    return [future.exception(60) or future.result() for future in futures]


def test_the_chief_tells_the_workers_what_is_trained(workers: tuple[str, ...]) -> None:
    job = TrainingJob('{"seed": 1}', bytes(range(256)) * 1000)
    _, one, two = in_threads(
        lambda: accept_workers(WorkerGroup(workers, 0), job, 'of {"seed": 1}', 30),
        lambda: join_chief(WorkerGroup(workers, 1), "of {}".format, 30),
        lambda: join_chief(WorkerGroup(workers, 2), "of {}".format, 30),
    )
    assert one == two == job


def test_a_worker_with_other_data_is_refused_by_name(workers: tuple[str, ...]) -> None:
    pair = workers[:2]
    chief, worker = in_threads(
        lambda: accept_workers(WorkerGroup(pair, 0), TrainingJob("{}", b""), "mine", 30),
        lambda: join_chief(WorkerGroup(pair, 1), lambda text: "other", 30),
    )
    assert f"Worker 1 at {pair[1]} has other" in str(chief)
    assert "cancelled the training" in str(worker)


def test_who_is_missing_is_told_by_address_to_all(workers: tuple[str, ...]) -> None:
    chief, worker = in_threads(
        lambda: accept_workers(WorkerGroup(workers, 0), TrainingJob("{}", b""), "{}", 2),
        lambda: join_chief(WorkerGroup(workers, 1), str, 30),
    )
    assert f"connected from {workers[2]}." in str(chief)
    assert "connected from" in str(worker)


def test_strangers_at_the_port_do_no_harm(workers: tuple[str, ...]) -> None:
    cluster, job = WorkerGroup(workers[:2], 0), TrainingJob("{}", b"x")

    def strangers_then_worker() -> TrainingJob:
        host, port = cluster.chief
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x02[]", b"\x00\x00\x00\x02no", b""):
            while True:
                try:
                    with socket.create_connection((host, port), 5) as stranger:
                        stranger.sendall(noise)
                    break
                except ConnectionRefusedError:
                    continue
        return join_chief(WorkerGroup(workers[:2], 1), str, 30)

    _, joined = in_threads(lambda: accept_workers(cluster, job, "{}", 30), strangers_then_worker)
    assert joined == job


def test_a_chief_that_is_not_there_is_told(workers: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"Worker 0 at .* does not answer within 1 s"):
        join_chief(WorkerGroup(workers, 1), str, 1)


def test_an_address_that_is_taken_is_told(workers: tuple[str, ...]) -> None:
    cluster = WorkerGroup(workers, 0)
    with (
        socket.create_server(cluster.chief),
        pytest.raises(UserError, match=r"cannot listen at .*in use"),
    ):
        accept_workers(cluster, TrainingJob("{}", b""), "", 1)


def test_the_commands_refuse_the_others_place(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from facegender.cli.main import main

    monkeypatch.setenv("TF_CONFIG", tf_config(index=0))
    monkeypatch.setattr("sys.argv", ["facegender", "worker"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 1
    assert "dvc repro" in capsys.readouterr().err


def test_processed_data_must_be_there(workers: tuple[str, ...], tmp_path: Path) -> None:
    from facegender.training.worker import run_worker

    with pytest.raises(UserError, match="Cannot read the processed data"):
        run_worker(WorkerGroup(workers, 1), tmp_path, 1)


def test_a_worker_that_does_not_know_the_parameters_is_refused(
    workers: tuple[str, ...], part: ProcessedSplit, tmp_path: Path
) -> None:
    from facegender.training.worker import run_worker

    pair, processed = workers[:2], tmp_path / "processed"
    processed.mkdir()
    for name in ("train", "validation"):
        (processed / name).symlink_to(part.directory)
    chief, worker = in_threads(
        lambda: accept_workers(WorkerGroup(pair, 0), TrainingJob('{"later": 1}', b""), "mine", 60),
        lambda: run_worker(WorkerGroup(pair, 1), processed, 60),
    )
    assert "code than worker 0" in str(chief)
    assert "cancelled the training" in str(worker)
