"""Training on several devices or machines: who takes part, and which share of a batch is whose.

The engine is `tf.distribute`: each device holds the whole network and computes a share of each
batch, and the gradients are summed. Keras' `fit` does not take MultiWorkerMirroredStrategy as it
comes (keras-team/keras issue 20585); with what `facegender.training.train` does for it, it does.
docs/scaling-training.md tells which, and how that was found out.

TensorFlow's cluster knows nothing of what is trained. Before it is formed, the chief (worker 0)
tells the others, over a plain connection to its own address in TF_CONFIG: parameters, and the
checkpoint to go on from. They answer with a digest of their data and code.
"""

import faulthandler
import gc
import json
import logging
import math
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from facegender.errors import UserError

if TYPE_CHECKING:
    import tensorflow as tf

_EXAMPLE = (
    '{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, '
    '"task": {"type": "worker", "index": 0}}'
)
_LOST = (
    "A worker is gone, or does not answer, so the training stopped: {reason}. Worker 0 keeps each "
    "epoch that ended. Start the other workers again with `facegender worker`, and worker 0 with "
    "`dvc repro`: training goes on after the last epoch."
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """The processes that train together.

    Attributes:
        workers: their addresses, `host:port`, the same list for all.
        index: which of them this process is; 0 is the chief.
    """

    workers: tuple[str, ...]
    index: int

    @property
    def chief(self) -> tuple[str, int]:
        """Host and port of worker 0."""
        host, _, port = self.workers[0].rpartition(":")
        return host.strip("[]"), int(port)


def read_cluster(text: str | None) -> Cluster:
    """Read what the environment variable TF_CONFIG says of the cluster.

    Raises:
        UserError: it is missing, is not JSON, or names no cluster of two workers or more.
    """
    advice = f"For worker 0 of two it is, for instance, TF_CONFIG='{_EXAMPLE}'."
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
        "task.index is none of a worker": type(index) is not int or not 0 <= index < len(workers),
    }
    if wrong := [fault for fault, found in faults.items() if found]:
        raise UserError(f"TF_CONFIG is not right: {wrong[0]}. {advice}")
    return Cluster(tuple(workers), index)


def require_chief(cluster: Cluster) -> None:
    """Refuse the pipeline to all workers but the first.

    Raises:
        UserError: this process is another worker.
    """
    if cluster.index:
        raise UserError(
            f"This is worker {cluster.index} of TF_CONFIG, where `facegender worker` is to be run: "
            "the pipeline runs at worker 0 alone, which logs and writes for all."
        )


@dataclass(frozen=True)
class Share:
    """The part of each batch that the devices of one process compute: `count` of `of` pieces.

    Attributes:
        first: the number of the first piece, from 0.
        count: pieces, one a device.
        of: pieces that the whole batch is cut into.
    """

    first: int = 0
    count: int = 1
    of: int = 1


WHOLE = Share()


def distribute(
    strategy: "tf.distribute.Strategy", make: "Callable[[Share], tf.data.Dataset]"
) -> "tf.data.Dataset | tf.distribute.DistributedDataset":
    """Return the dataset that a strategy trains on: each process makes its own share alone."""
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return make(WHOLE)

    def own(context: "tf.distribute.InputContext") -> "tf.data.Dataset":
        count = replicas // context.num_input_pipelines
        return make(Share(context.input_pipeline_id * count, count, replicas))

    return strategy.distribute_datasets_from_function(own)


@contextmanager
def open_strategy(name: str, wait: float) -> "Iterator[tf.distribute.Strategy]":
    """Yield the strategy that `train.strategy` names; make it before anything else of TensorFlow.

    Args:
        name: `none`, `mirrored` (all devices of this machine), or `multi_worker` (of TF_CONFIG).
        wait: seconds in which all workers must be in TensorFlow's cluster, or the process ends.

    Raises:
        UserError: in the body, a worker is gone.
    """
    import tensorflow as tf

    if name == "none":
        # TensorFlow's default, which does nothing.
        yield tf.distribute.get_strategy()
    elif name == "mirrored":
        strategy = tf.distribute.MirroredStrategy()
        if strategy.num_replicas_in_sync == 1:
            _log.warning("train.strategy: mirrored finds one device, and gains nothing")
        yield strategy
    else:
        # TensorFlow waits in C++, for up to an hour, deaf to signals. Who came to the meeting
        # and died before the cluster stood must not hang the others.
        faulthandler.dump_traceback_later(wait, exit=True, file=2)
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
            faulthandler.cancel_dump_traceback_later()
            yield strategy
        except tf.errors.OpError as error:
            if not _is_lost_worker(error):
                raise
            _free_frames(error)
            raise UserError(_LOST.format(reason=_first_reason(error))) from error
        finally:
            faulthandler.cancel_dump_traceback_later()


def _free_frames(error: BaseException | None) -> None:
    # They hold a pool of threads that TensorFlow did not close, which, if it lives until the
    # process ends, complains then with a traceback. Keras took TensorFlow's own frames out of the
    # error's traceback, but those that they called are there, and hold them. The pool is in a
    # cycle, too.
    while error is not None:
        for inner, _ in traceback.walk_tb(error.__traceback__):
            for frame, _ in traceback.walk_stack(inner):
                with suppress(RuntimeError):  # it still runs
                    frame.clear()
        error = error.__context__
    gc.collect()


def _is_lost_worker(error: Exception) -> bool:
    text = str(error)
    return "Collective ops is aborted" in text or "CoordinationService" in text


def _first_reason(error: Exception) -> str:
    text = str(error).partition("Collective ops is aborted by: ")[2] or str(error)
    for rest in ("Additional GRPC error", "The tasks have crashed", "The error could be"):
        text = text.partition(rest)[0]
    return " ".join(text.split())[:300].rstrip(". ")


@dataclass(frozen=True)
class Invitation:
    """What the chief tells a worker."""

    params: str
    checkpoint: bytes


def invite(cluster: Cluster, invitation: Invitation, digest: str, wait: float) -> None:
    """Wait until all other workers have called, and tell them what is trained.

    Args:
        cluster: of which this process is the chief.
        invitation: what to tell them.
        digest: of data and code, which theirs must equal.
        wait: seconds until the last must have called.

    Raises:
        UserError: some did not call, or one has other data or code; the others are told.
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
                    f"Within {wait:.0f} s no `facegender worker` called from {', '.join(missing)}. "
                    "Start it there, or take the address out of TF_CONFIG."
                )
                break
            try:
                _send(caller, {"params": invitation.params})
                answer = _receive(caller, deadline)
                index, theirs = int(answer["index"]), answer["digest"]
                address = others[index]
            except (OSError, EOFError, ValueError, LookupError, TypeError):
                caller.close()  # no worker, or one that was stopped
                continue
            callers[index] = caller
            if theirs != digest:
                refusal = (
                    f"Worker {index} at {address} has other data, starting weights, packages or "
                    "code than worker 0. Check the same commit out there, and fetch its "
                    "data/processed with `dvc pull preprocess`."
                )
        for caller in callers.values():
            with suppress(OSError):
                _send(caller, {"refusal": refusal})
                caller.send_bytes(invitation.checkpoint)
    if refusal is not None:
        raise UserError(refusal)


def join(cluster: Cluster, digest: Callable[[str], str], wait: float) -> Invitation:
    """Call the chief, until it answers, and return what it tells.

    Args:
        cluster: of which this process is a worker, not the chief.
        digest: from the parameters as JSON to the digest of data and code.
        wait: seconds until the chief must have answered.

    Raises:
        UserError: the chief does not answer, or refuses this worker or another one.
    """
    deadline = time.monotonic() + wait
    digest = cache(digest)  # of large data it takes longer than the chief listens
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
            raise UserError(f"Worker 0 called the training off: {refusal}")
        return Invitation(params, checkpoint)


def _send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _receive(connection: Connection, deadline: float, patience: float = 60) -> dict[str, Any]:
    # Who is connected and silent does not keep the others waiting for long.
    if not connection.poll(max(0.0, min(patience, deadline - time.monotonic()))):
        raise EOFError("silent")
    return json.loads(connection.recv_bytes(maxlength=1_000_000))
