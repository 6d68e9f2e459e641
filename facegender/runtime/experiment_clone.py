"""One DVC experiment in a clone of its own, because DVC's experiments share one stash in a clone.

Of two `dvc exp run --temp` in one clone, one may run what the other has queued: parameters and name
stay together, but the process, its output, exit code and environment are the other experiment's.
Clones share git's objects and DVC's cache with the repository, so that making one is cheap, and an
experiment that has finished is fetched as DVC does it, by its ref. Functions raise UserError if git
refuses.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from facegender.runtime.git import checked_git

_NOBODY = ("-c", "user.name=facegender", "-c", "user.email=facegender@localhost")


@dataclass(frozen=True)
class Snapshot:
    """The state of a repository from which experiments start."""

    root: Path
    head: str
    changed: str  # commit whose tree has the uncommitted changes of tracked files, or `head`
    cache: Path


def take_snapshot(root: Path) -> Snapshot:
    """Return the current state of a repository without changing it."""
    from dvc.repo import Repo

    # An experiment in this repository hides uncommitted changes while it holds DVC's lock.
    with Repo(str(root), _wait_for_lock=True) as repo, repo.lock:
        head = checked_git(root, "rev-parse", "HEAD")
        # Refreshes the index: `stash create` fails silently if only the time of a file changed.
        checked_git(root, "status", "--porcelain")
        changed = checked_git(root, *_NOBODY, "stash", "create")
        return Snapshot(root, head, changed or head, Path(repo.cache.local_cache_dir))


def make_clone(snapshot: Snapshot, target: Path) -> None:
    """Clone a repository with its uncommitted changes, sharing DVC's cache and settings."""
    from dvc.config import Config, merge
    from dvc.config_schema import RelPath

    root = snapshot.root
    # Not `git clone --shared`, which shares nothing if the repository is shallow.
    checked_git(root, "init", "--quiet", "--template=", str(target))
    objects, shallow = (
        root / checked_git(root, "rev-parse", "--git-path", name) for name in ("objects", "shallow")
    )
    (target / ".git" / "objects" / "info").mkdir(exist_ok=True)
    (target / ".git" / "objects" / "info" / "alternates").write_text(f"{objects.resolve()}\n")
    if shallow.is_file():
        shutil.copy(shallow, target / ".git" / "shallow")
    checked_git(target, "checkout", "--quiet", "--detach", snapshot.head)
    checked_git(target, "read-tree", "--reset", "-u", snapshot.changed)
    # The committer's identity, and the address that MLflow records for the code.
    for name in ("user.name", "user.email", "remote.origin.url"):
        if value := checked_git(root, "config", "--default", "", name):
            checked_git(target, "config", name, value)
    # Read and written by DVC, because paths are relative to the file. It writes ASCII only, so the
    # path of the cache must be relative, too.
    local = Config(str(root / ".dvc")).load_one("local")
    cache = RelPath(snapshot.cache.resolve())
    with Config(str((target / ".dvc").resolve())).edit("local") as config:
        merge(config, {**local, "cache": {**local["cache"], "dir": cache}})


def fetch_experiment(root: Path, clone: Path, name: str) -> str | None:
    """Fetch an experiment from a clone into the repository.

    Returns:
        The experiment's commit, or None if the clone does not have it.
    """
    refs = checked_git(clone, "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps")
    for line in refs.splitlines():
        commit, _, ref = line.partition(" ")
        if ref.endswith(f"/{name}"):
            options = ("--quiet", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance")
            checked_git(root, "fetch", *options, str(clone), f"{ref}:{ref}")
            return commit
    return None


def experiments(root: Path) -> set[str]:
    """Return the names of a repository's experiments that start at its HEAD."""
    head = checked_git(root, "rev-parse", "HEAD")
    folder = f"refs/exps/{head[:2]}/{head[2:]}/"
    refs = checked_git(root, "for-each-ref", "--format=%(refname)", folder).split()
    return {ref.removeprefix(folder) for ref in refs}
