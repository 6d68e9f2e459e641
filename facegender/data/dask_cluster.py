"""Tasks on a Dask cluster, run by a joblib backend of our own.

joblib's Dask backend waits forever for a task that the cluster gave up, and fetches results before
earlier ones are written.
"""

import asyncio
import functools
import importlib.util
import logging
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from importlib.metadata import version
from multiprocessing import TimeoutError as NoTaskEnded  # joblib's choice; no builtin TimeoutError
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import PIL
from distributed import Client, Future, Security, rpc
from distributed.scheduler import KilledWorker
from joblib.parallel import ParallelBackendBase
from PIL import features

from facegender.errors import UserError
from facegender.files import file_sha256

# A function with its arguments, as `joblib.delayed` returns it.
Task = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

# Modules whose code decides the decoded bytes.
_DECODING = (
    "data/damaged_metadata.py",
    "data/decode_rows.py",
    "data/face_images.py",
    "data/fingerprints.py",
    "data/images.py",
    "faces/crop.py",
    "faces/detector.py",
    "model/interpreter.py",
)
_HELD = 4  # results that have arrived and are not yet used
_ANSWER_SECONDS = 10  # for requests that a scheduler answers without asking its workers


def run_tasks(tasks: Iterable[Task], scheduler: str, *, patience: float) -> Iterator[Any]:
    """Run tasks on a cluster and yield their results as they end.

    If a worker is lost, its tasks run again on another, so they must be idempotent. Only a few
    tasks for each thread of the cluster, and a few results, are held at any time.

    Args:
        tasks: functions of this package, with arguments that can be pickled.
        scheduler: address of the scheduler, such as tcp://10.0.0.1:8786.
        patience: seconds within which the scheduler must answer, a worker join and a task end.

    Raises:
        UserError: a wait took too long, the cluster gave up a task, or a worker has another version
            of the code or of a decoder.
    """
    client = _connect(scheduler, patience)
    try:
        _check_workers(client)
        backend = _Backend(client, patience)
        here = environment()
        results = joblib.Parallel(
            backend=backend, batch_size=1, timeout=patience, return_as="generator_unordered"
        )((_run, (here, *task), {}) for task in tasks)
        for result in results:
            yield result
            backend.used()
    except (NoTaskEnded, TimeoutError) as error:
        raise UserError(
            f"No task has ended on the Dask cluster for {patience:g} seconds: {_state(client)}. "
            "Only this stage is lost: see the logs of its workers, and run `dvc repro` again. If "
            "tasks take that long, raise compute.patience."
        ) from error
    except CancelledError as error:
        raise UserError(
            f"The connection to the Dask scheduler at {scheduler} was lost while tasks ran. When "
            "it is up again, run `dvc repro` again."
        ) from error
    except KilledWorker as error:
        raise UserError(
            f"The Dask cluster gave up a task: {error.allowed_failures + 1} workers died while "
            f"running it, the last at {error.last_worker.address}. The usual causes are too little "
            "memory and another commit of facegender: see their logs."
        ) from error
    finally:
        with suppress(TimeoutError):
            client.close(timeout=_ANSWER_SECONDS)


@functools.cache
def environment() -> Mapping[str, str]:
    """Return, by name, what decides a task's bytes apart from its input.

    Bytes are promised to be the same on one type of machine only, so its name is included.
    """
    package = Path(__file__).parents[1]
    return {
        "machine": platform.machine(),
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "NumPy": np.__version__,
        "Pillow": PIL.__version__,
        "libjpeg": str(features.version("jpg")),
        "pillow-heif": version("pillow-heif"),
        "LiteRT": version("ai-edge-litert"),
        **{f"facegender/{name}": file_sha256(package / name)[:12] for name in _DECODING},
    }


def _run(
    expected: Mapping[str, str], function: Callable[..., Any], args: tuple, kwargs: dict
) -> Any:
    """Run a task if this worker's environment is the sender's: workers may join at any time."""
    if (found := environment()) != expected:
        differences = ", ".join(
            f"{name} {found.get(name)} instead of {value}"
            for name, value in expected.items()
            if found.get(name) != value
        )
        raise UserError(
            f"The Dask worker on {platform.node()} would not produce the same bytes: it has "
            f"{differences}. Install this commit of facegender from requirements-scale.lock on "
            "every worker, and restart the workers."
        )
    return function(*args, **kwargs)


def _connect(scheduler: str, patience: float) -> Client:
    # Dask logs pages of tracebacks when a connection is lost; the error that it raises is enough.
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        # A client waits forever for a scheduler that accepts its connection and stays silent.
        asyncio.run(asyncio.wait_for(_greet(scheduler), patience))
        client = Client(scheduler, timeout=patience, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"No Dask scheduler answers at {scheduler} within {patience:g} seconds "
            f"({type(error).__name__}). Start one with `dask scheduler`, correct "
            "compute.scheduler, or set compute.backend to loky."
        ) from error
    try:
        client.wait_for_workers(1, timeout=patience)
    except TimeoutError as error:
        with suppress(TimeoutError):
            client.close(timeout=_ANSWER_SECONDS)
        raise UserError(
            f"The Dask scheduler at {scheduler} has had no worker for {patience:g} seconds. Start "
            f"some with `dask worker {scheduler}`; if they need longer, raise compute.patience."
        ) from error
    return client


def _check_workers(client: Client) -> None:
    """Check that the workers have this module.

    The function is Python's own, because a worker dies if it cannot import one that it is sent.
    """
    asked = [
        client.submit(
            importlib.util.find_spec,
            __name__,
            workers=[worker],
            allow_other_workers=True,
            pure=False,
        )
        for worker in client.nthreads()
    ]
    for future in asked:
        try:
            lacks = future.result(timeout=_ANSWER_SECONDS) is None
        except TimeoutError:
            continue  # do not wait for a slow worker
        except ImportError:
            lacks = True
        if lacks:
            raise UserError(
                f"A Dask worker has no {__name__}. Install this commit of facegender from "
                "requirements-scale.lock on every worker, and restart them."
            )


async def _greet(scheduler: str) -> None:
    certificates = Security().get_connection_args("client")  # from Dask's configuration
    async with rpc(scheduler, connection_args=certificates) as remote:
        await remote.identity()


def _state(client: Client) -> str:
    try:
        workers = len(client.nthreads(callback_timeout=_ANSWER_SECONDS))
    except (OSError, TimeoutError):
        return "its scheduler does not answer"
    return f"it has {workers} worker(s)" if workers else "it has no worker left"


class _Backend(ParallelBackendBase):
    """Runs joblib's tasks as Dask futures, whose results wait until there is room for them."""

    supports_retrieve_callback = True
    default_n_jobs = -1

    def __init__(self, client: Client, patience: float) -> None:
        super().__init__(nesting_level=0)
        self._client = client
        self._patience = patience
        self._room = threading.Semaphore(_HELD)
        self._over = False

    def effective_n_jobs(self, n_jobs: int) -> int:
        # With one job, joblib would run the tasks in this process.
        return max(2, sum(self._client.nthreads().values()))

    def submit(self, func: Callable[[], Any], callback: Callable[[Future], None]) -> Future:
        future = self._client.submit(func, pure=False)
        future.add_done_callback(functools.partial(self._hand_over, callback))
        return future

    def _hand_over(self, callback: Callable[[Future], None], future: Future) -> None:
        # Blocks Dask's only callback thread, so later results wait on their workers: joblib sends
        # the next task only when it receives a result.
        self._room.acquire()
        if self._over:
            self._room.release()
        else:
            callback(future)

    def retrieve_result_callback(self, out: Future) -> Any:
        return out.result(timeout=self._patience)

    def used(self) -> None:
        """Make room for another result."""
        self._room.release()

    def terminate(self) -> None:
        self._over = True
        self._room.release()
