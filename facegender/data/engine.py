"""Where tasks run: in processes of this machine (loky), or on a Dask cluster."""

from collections.abc import Iterable, Iterator
from typing import Any

import joblib

from facegender.errors import UserError


def run_tasks(
    tasks: Iterable[Any], *, jobs: int = -1, scheduler: str | None = None, patience: float = 300
) -> Iterator[Any]:
    """Run tasks and yield their results as they end, in any order.

    Args:
        tasks: what `joblib.delayed` makes.
        jobs: processes of this machine; -1 for one a core.
        scheduler: address of a Dask cluster that runs them, instead of this machine.
        patience: seconds without sign of life after which a cluster is given up.

    Raises:
        UserError: the cluster does not answer, is lost, or runs other code.
    """
    if scheduler is None:
        yield from joblib.Parallel(jobs, return_as="generator_unordered")(tasks)
        return
    try:
        from facegender.data import dask_cluster
    except ImportError as error:
        raise UserError(
            f"compute.backend is dask, which is not installed ({error}). Install it with "
            "`pip install 'facegender[dask]'` or `make install-scale`, or set it to loky."
        ) from error
    yield from dask_cluster.run_tasks(tasks, scheduler, patience=patience)
