"""How the workers of a training meet: TF_CONFIG, and what the chief sends to the others.

TensorFlow's cluster does not share what is trained. Before the cluster forms, the chief (worker 0)
listens at its own address in TF_CONFIG. Over a plain connection it sends the parameters, and the
others answer with a digest of their data and code. Then it sends the checkpoint to resume from.
"""

import json
import logging
import math
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

from facegender.errors import UserError

_log = logging.getLogger(__name__)


_EXAMPLE = (
    '{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, '
    '"task": {"type": "worker", "index": 0}}'
)


@dataclass(frozen=True)
class WorkerGroup:
    """The processes that train together.

    Attributes:
        workers: their addresses, `host:port`, the same list for all.
        index: index of this process among them; 0 is the chief.
    """

    workers: tuple[str, ...]
    index: int

    @property
    def chief(self) -> tuple[str, int]:
        """Host and port of worker 0."""
        host, _, port = self.workers[0].rpartition(":")
        return host.strip("[]"), int(port)


def read_worker_group(text: str | None) -> WorkerGroup:
    """Return the worker group that the environment variable TF_CONFIG describes.

    Raises:
        UserError: it is missing, is not JSON, or does not describe two workers or more.
    """
    advice = (
        f"Example for worker 0 (the chief) of two: TF_CONFIG='{_EXAMPLE}'. The other worker "
        "takes the same with index 1."
    )
    if not text:
        raise UserError(
            f"train.strategy: multi_worker needs TF_CONFIG, which names the workers. {advice}"
        )
    try:
        content = json.loads(text)
        jobs, task = content["cluster"], content["task"]
        workers, index = jobs["worker"], task["index"]
        ports = [int(address.rpartition(":")[2]) for address in workers]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"TF_CONFIG cannot be read ({type(error).__name__}: {error}). {advice}"
        ) from error
    faults = {
        "it has other jobs than `worker`": set(jobs) != {"worker"} or task.get("type") != "worker",
        "it names fewer than two workers": len(workers) < 2,
        "it names an address twice": len(set(workers)) < len(workers),
        "an address has no port": not all(
            address.rpartition(":")[0] and 0 < port < 65536
            for address, port in zip(workers, ports, strict=True)
        ),
        "task.index is out of range": type(index) is not int or not 0 <= index < len(workers),
    }
    if wrong := [fault for fault, found in faults.items() if found]:
        raise UserError(f"TF_CONFIG is wrong: {wrong[0]}. {advice}")
    return WorkerGroup(tuple(workers), index)


def require_chief(cluster: WorkerGroup) -> None:
    """Raise UserError if this process is not worker 0, which alone runs the pipeline."""
    if cluster.index:
        raise UserError(
            f"This is worker {cluster.index} of TF_CONFIG: run `facegender worker` here. Only "
            "worker 0 runs the pipeline; it logs and writes for all."
        )


@dataclass(frozen=True)
class TrainingJob:
    """The chief's instructions to a worker."""

    params: str
    checkpoint: bytes


def accept_workers(cluster: WorkerGroup, job: TrainingJob, digest: str, wait: float) -> None:
    """Wait until all other workers have connected, and send them the job.

    Args:
        cluster: worker group in which this process is the chief.
        job: instructions for them.
        digest: digest of data and code, which must equal the workers'.
        wait: seconds within which all must connect.

    Raises:
        UserError: a worker did not connect, or has other data or code; the others are told.
    """
    deadline = time.monotonic() + wait
    others = dict(list(enumerate(cluster.workers))[1:])
    _log.info("waiting for %d worker(s) at %s", len(others), cluster.workers[0])
    with ExitStack() as stack:
        try:
            listener = stack.enter_context(
                socket.create_server(
                    cluster.chief,
                    family=socket.AF_INET6 if ":" in cluster.chief[0] else socket.AF_INET,
                )
            )
        except OSError as error:
            raise UserError(
                f"Worker 0 cannot listen at {cluster.workers[0]}, its address in TF_CONFIG: "
                f"{error.strerror or error}."
            ) from error
        callers: dict[int, Connection] = {}
        refusal = None
        while len(callers) < len(others) and refusal is None:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                caller = stack.enter_context(Connection(listener.accept()[0].detach()))
            except TimeoutError:
                missing = [others[index] for index in others if index not in callers]
                refusal = (
                    f"Within {wait:.0f} s no `facegender worker` connected from "
                    f"{', '.join(missing)}. Start it there, or remove the address from TF_CONFIG."
                )
                break
            try:
                _send(caller, {"params": job.params})
                answer = _receive(caller, deadline)
                index, theirs = int(answer["index"]), answer["digest"]
                address = others[index]
            except (OSError, EOFError, ValueError, LookupError, TypeError):
                caller.close()  # not a worker, or one that was stopped
                continue
            callers[index] = caller
            if theirs != digest:
                refusal = (
                    f"Worker {index} at {address} has other data, starting weights, packages or "
                    "code than worker 0. Check out the same commit there, and fetch its "
                    "data/processed with `dvc pull preprocess`."
                )
        for caller in callers.values():
            with suppress(OSError):
                _send(caller, {"refusal": refusal})
                caller.send_bytes(job.checkpoint)
    if refusal is not None:
        raise UserError(refusal)


def join_chief(cluster: WorkerGroup, digest: Callable[[str], str], wait: float) -> TrainingJob:
    """Connect to the chief, trying again until it answers, and return the job.

    Args:
        cluster: worker group in which this process is a worker, not the chief.
        digest: from the parameters as JSON to the digest of data and code.
        wait: seconds within which the chief must answer.

    Raises:
        UserError: the chief does not answer, or refuses this worker or another one.
    """
    deadline = time.monotonic() + wait
    digest = cache(digest)  # for large data it takes longer than the chief listens
    gone = f"Worker 0 at {cluster.workers[0]} {{}} Start it there with `dvc repro`."
    while True:
        try:
            called = socket.create_connection(cluster.chief, timeout=10)
            called.settimeout(None)
            with Connection(called.detach()) as chief:
                params = _receive(chief, deadline)["params"]
                _send(chief, {"index": cluster.index, "digest": digest(params)})
                # The chief waits for the others now.
                refusal = _receive(chief, math.inf, patience=wait)["refusal"]
                checkpoint = chief.recv_bytes()
        except (OSError, EOFError, ValueError, KeyError) as error:
            if time.monotonic() > deadline:
                raise UserError(gone.format(f"does not answer within {wait:.0f} s.")) from error
            time.sleep(1)
            continue
        if refusal is not None:
            raise UserError(f"Worker 0 cancelled the training: {refusal}")
        return TrainingJob(params, checkpoint)


def _send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _receive(connection: Connection, deadline: float, patience: float = 60) -> dict[str, Any]:
    # A silent connection must not keep the others waiting.
    if not connection.poll(max(0.0, min(patience, deadline - time.monotonic()))):
        raise EOFError("silent")
    return json.loads(connection.recv_bytes(maxlength=1_000_000))
