"""MLflow's local store on disk: addresses after a move, and runs whose process is gone.

The store is `mlflow.db`, with the artifacts under `mlruns/` in the same folder. MLflow stores
artifact addresses as absolute paths and cannot change them, so this module uses SQL.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

# Every column that holds an artifact address; a test looks for others.
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("trace_tags", "value"),
)
_BUSY_SECONDS = 60


def store_home(root: Path) -> Path:
    """Return the folder that holds a repository's store: its root, unless mlflow.db is a link."""
    return (root / "mlflow.db").resolve().parent


def relocate(home: Path, experiment: str) -> int:
    """Update the artifact addresses in the database of a store that was moved to `home`.

    The address of `experiment` shows where the store was before. Addresses under that folder are
    rewritten in one transaction, except where only the former folder still has the artifacts,
    because somebody copied the database alone. A store that was not moved is not written to.

    Args:
        home: resolved folder of `mlflow.db`.
        experiment: name of the experiment whose artifacts are in `mlruns/<experiment>`.

    Returns:
        The number of changed addresses.
    """
    database = home / "mlflow.db"
    if not database.is_file():
        return 0
    with closing(sqlite3.connect(database, timeout=_BUSY_SECONDS)) as connection:
        former = _former_home(connection, experiment)
        if former is None or former == home:
            return 0
        changed = 0
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            for table, column in _ADDRESSES:
                # Names come from the constant above, not from input.
                rows = connection.execute(f"SELECT rowid, {column} FROM {table}").fetchall()  # noqa: S608
                for row, address in rows:
                    new = _moved(address, former, home, always=table == "experiments")
                    if new is not None:
                        connection.execute(
                            f"UPDATE {table} SET {column} = ? WHERE rowid = ?",  # noqa: S608
                            (new, row),
                        )
                        changed += 1
    return changed


def _former_home(connection: sqlite3.Connection, experiment: str) -> Path | None:
    try:
        row = connection.execute(
            "SELECT artifact_location FROM experiments WHERE name = ?", (experiment,)
        ).fetchone()
    except sqlite3.OperationalError:  # a database without MLflow's tables
        return None
    location = _path(row[0]) if row else None
    if location is None or location.parts[-2:] != ("mlruns", experiment):
        return None
    return location.parents[1]


def _moved(address: str | None, former: Path, home: Path, *, always: bool) -> str | None:
    old = _path(address or "")
    if old is None or not old.is_relative_to(former):
        return None
    new = home / old.relative_to(former)
    if not always and old.exists() and not new.exists():
        return None
    return new.as_uri() if (address or "").startswith("file:") else str(new)


def _path(address: str) -> Path | None:
    """Return the path of an address, or None; MLflow writes absolute paths and file: URIs."""
    if address.startswith("/"):
        return Path(address)
    parts = urlsplit(address)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"}:
        return Path(unquote(parts.path))
    return None


@contextmanager
def run_lock(artifact_uri: str) -> Iterator[ExitStack]:
    """Hold a lock file next to a run's artifacts while this process works on the run.

    The system releases the lock however the process ends, so `owner_is_gone` can tell. Runs on a
    tracking server have no lock.

    Yields:
        The stack that removes the lock's file at the end. After its `pop_all` the file stays, and
        `owner_is_gone` finds a run that could not be ended.
    """
    path = _lock_path(artifact_uri)
    if path is None:
        yield ExitStack()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path), ExitStack() as removal:
        removal.callback(path.unlink, missing_ok=True)
        yield removal


def owner_is_gone(artifact_uri: str) -> bool:
    """Return whether the process that held a run's lock is gone, and remove its lock file.

    Also False if the run never had a lock, such as a run from another machine.
    """
    path = _lock_path(artifact_uri)
    if path is None or not path.is_file():
        return False
    try:
        with FileLock(path, blocking=False):
            path.unlink(missing_ok=True)
    except Timeout:
        return False
    return True


def _lock_path(artifact_uri: str) -> Path | None:
    artifacts = _path(artifact_uri)
    return None if artifacts is None else artifacts.parent / "running.lock"
