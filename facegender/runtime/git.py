"""Git, run as a program: its libraries cannot fetch what a partial clone lacks.

Functions raise UserError if git fails, in its words, or is slow, and if a file is unreadable.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAMLError

from facegender.errors import UserError, reason_of
from facegender.files import parse_yaml

# A partial clone fetches a commit's files from its server.
_GIT_SECONDS = 120
# Git's hooks are for people: one that `dvc install` sets up would check out data in each clone.
_GIT = ("git", "-c", "core.hooksPath=/dev/null", "-c", "advice.detachedHead=false")
# A hook or another git may have set these, for another repository.
_GIT_VARIABLES = {
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_DIR",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
    "GIT_WORK_TREE",
}


def read_text(root: Path, path: str, commit: str | None) -> str | None:
    """Return the text of a file of a commit or, without one, of the work tree; None if missing."""
    try:
        content = read_bytes(root, path, commit)
        return None if content is None else content.decode("utf-8")
    except UnicodeError as error:
        raise _unreadable(path, commit, error) from error


def read_bytes(root: Path, path: str, commit: str | None) -> bytes | None:
    """Return the bytes of a file of a commit or, without one, of the work tree; None if missing."""
    try:
        if commit is None:
            file = root / path
            return file.read_bytes() if file.is_file() else None
    except OSError as error:
        raise _unreadable(path, commit, error) from error
    entry = git(root, "ls-tree", commit, "--", path).split()
    return _run(root, "cat-file", "blob", entry[2]) if entry[1:2] == ["blob"] else None


def committed_text(root: Path, path: str, commit: str) -> str:
    """Return the text of a file that a commit must have."""
    text = read_text(root, path, commit)
    if text is None:
        raise UserError(
            f"Commit {commit[:10]} has no {path}. Choose one with the results of `dvc repro`."
        )
    return text


def read_yaml(root: Path, path: str, commit: str | None) -> Any:
    """Return the content of a YAML file, as `read_text` reads it; None if missing or empty."""
    try:
        return parse_yaml(read_text(root, path, commit) or "")
    except YAMLError as error:
        raise _unreadable(path, commit, error) from error


def _unreadable(path: str, commit: str | None, error: Exception) -> UserError:
    where, advice = "the work tree", f"Correct it, or restore it with `git checkout HEAD {path}`"
    if commit:
        where, advice = commit[:10], "Choose another commit"
    return UserError(f"Cannot read {path} of {where}: {reason_of(error)}. {advice}.")


def resolve(root: Path, revision: str) -> str:
    """Return the commit of a branch, tag, commit or DVC experiment whose name is unique."""
    commit = git(
        root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"
    )
    if commit:
        return commit
    listed = git(root, "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps")
    experiments = [line.split(" ", 1) for line in listed.splitlines()]
    found = {commit for commit, name in experiments if name.rpartition("/")[2] == revision}
    if len(found) > 1:
        raise UserError(
            f"Several experiments are called '{revision}': name the commit of one, which "
            "`dvc exp show` lists."
        )
    if not found:
        raise UserError(
            f"Cannot read {revision}: unknown Git revision '{revision}'. If it is on the server, "
            f"`git fetch` it first{shallow_hint(root)}."
        )
    return found.pop()


def shallow_hint(root: Path) -> str:
    """Return a clause of advice if the clone is shallow, else nothing."""
    shallow = git(root, "rev-parse", "--is-shallow-repository") == "true"
    note = "; this clone is shallow: `git fetch --unshallow` gets the commits that it lacks"
    return note if shallow else ""


def git(root: Path, *arguments: str) -> str:
    """Return what git prints; nothing if it exits with 1 silently: a query found nothing."""
    return _run(root, *arguments).decode("utf-8", "replace").strip()


def checked_git(root: Path, *arguments: str) -> str:
    """Return what git prints, for commands that must succeed and may take long."""
    return _run(root, *arguments, query=False).decode("utf-8", "replace").strip()


def _run(root: Path, *arguments: str, query: bool = True) -> bytes:
    environment = {name: value for name, value in os.environ.items() if name not in _GIT_VARIABLES}
    try:
        done = subprocess.run(
            [*_GIT, *arguments],
            cwd=root,
            capture_output=True,
            check=False,
            stdin=subprocess.DEVNULL,
            # Without a terminal neither git nor ssh can wait for a password.
            start_new_session=True,
            env=environment | {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"},
            timeout=_GIT_SECONDS if query else None,
        )
    except OSError as error:
        raise UserError(f"Cannot run git: {error}. Install it, or put it on PATH.") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"git {arguments[0]} took more than {_GIT_SECONDS} seconds. Check the network and the "
            "disk; `git fetch` gets what a partial clone lacks."
        ) from error
    if done.returncode == 0:
        return done.stdout
    if query and done.returncode == 1 and not done.stderr:
        return b""
    words = " ".join(done.stderr.decode("utf-8", "replace").split())
    raise UserError(f"git {arguments[0]} failed: {words or f'exit code {done.returncode}'}")
