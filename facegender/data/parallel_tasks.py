"""Runs tasks in processes of this machine (loky) or on a Dask cluster."""

from collections.abc import Iterable, Iterator
from typing import Any, TypedDict

import joblib
from joblib.externals import loky
from joblib.externals.loky.process_executor import TerminatedWorkerError

from facegender.errors import UserError


class Where(TypedDict, total=False):
    """Keyword arguments of `run_tasks`."""

    jobs: int
    scheduler: str | None
    patience: float


def run_tasks(
    tasks: Iterable[Any], *, jobs: int = -1, scheduler: str | None = None, patience: float = 300
) -> Iterator[Any]:
    """Run tasks and yield their results as they end.

    Args:
        tasks: calls from `joblib.delayed`. The first argument of each is a list of files; other
            lists of the same length hold one item for each file.
        jobs: number of processes on this machine; -1 for one a core.
        scheduler: address of a Dask cluster to use instead of this machine.
        patience: seconds without a sign of life after which the cluster is given up.

    Raises:
        UserError: a process of this machine is killed (names the file if one file alone kills it);
            the cluster does not answer, is lost, or runs other code.
    """
    if scheduler is None:
        yield from _run_here(tasks, jobs)
        return
    try:
        from facegender.data import dask_cluster
    except ImportError as error:
        raise UserError(
            f"compute.backend is dask, which is not installed ({error}). Install it with "
            "`pip install 'facegender[dask]'` or `make install-scale`, or set it to loky."
        ) from error
    yield from dask_cluster.run_tasks(tasks, scheduler, patience=patience)


def _run_here(tasks: Iterable[Any], jobs: int) -> Iterator[Any]:
    """Run tasks in processes of this machine; if one is killed, find the file that does it."""
    started: dict[int, Any] = {}

    def numbered() -> Iterator[Any]:
        for number, task in enumerate(tasks):
            started[number] = task
            yield joblib.delayed(_with_number)(number, *task)

    try:
        for number, result in joblib.Parallel(jobs, return_as="generator_unordered")(numbered()):
            del started[number]
            yield result
    except TerminatedWorkerError as error:
        killer = _find_killer(started.values())
        raise UserError(
            "A process that decodes images was killed, and no file does this alone: the likely "
            "cause is too little memory. Close other programs, or start again with fewer "
            "processes: `LOKY_MAX_CPU_COUNT=1 dvc repro`."
            if killer is None
            else f"The process that decodes {str(killer)!r} is killed each time: the file crashes "
            "the decoder or needs too much memory. List it in the file that data.exclude names, or "
            "free some memory."
        ) from error


def _with_number(number: int, function: Any, args: Any, kwargs: Any) -> tuple[int, Any]:
    return number, function(*args, **kwargs)


def _find_killer(tasks: Iterable[Any]) -> Any | None:
    """Return the first file of unfinished tasks that by itself kills the process that reads it."""
    # One by one, because bisection would decode files more than once.
    with loky.ProcessPoolExecutor(max_workers=1) as executor:
        for function, args, kwargs in tasks:
            for index, file in enumerate(args[0]):

                def one(value: Any, index: int = index, files: int = len(args[0])) -> Any:
                    whole = isinstance(value, list) and len(value) == files
                    return value[index : index + 1] if whole else value

                run = executor.submit(
                    function,
                    *map(one, args),
                    **{name: one(value) for name, value in kwargs.items()},
                )
                if isinstance(run.exception(), TerminatedWorkerError):
                    return file
    return None
