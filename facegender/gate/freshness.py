"""Whether results are those of the code, data and parameters beside them, as dvc.lock records."""

import hashlib
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from facegender.errors import UserError
from facegender.runtime.git import read_bytes, read_yaml

_LISTED = 5


def edited_results(root: Path, paths: Collection[str] | None, commit: str | None) -> list[str]:
    """Return the results whose bytes are not those that dvc.lock records.

    Args:
        root: the repository.
        paths: results to check; None for every one that is a file there.
        commit: the commit whose dvc.lock and results are read; None for the work tree.

    Raises:
        UserError: dvc.lock is unreadable.
    """
    recorded = {
        out["path"]: out["md5"]
        for stage in _read_lock(root, commit).values()
        for out in stage.get("outs", [])
        if paths is None or out["path"] in paths
    }
    contents = {path: read_bytes(root, path, commit) for path in recorded}
    return [
        path
        for path, content in contents.items()
        if content is not None and _md5(content) != recorded[path]
    ]


def why_stale(root: Path, results: Collection[str]) -> list[str]:
    """Return why results in the work tree do not belong to what surrounds them; empty if they do.

    Compared with dvc.lock: the results, and parameters and code of every stage that they depend
    on. Data are compared by what dvc.lock records of them, so that the clone need not hold them.

    Args:
        root: the repository.
        results: paths of the results.

    Raises:
        UserError: dvc.lock, or a file of parameters, is unreadable.
    """
    lock = _read_lock(root, None)
    results = list(results)
    made_by = {out["path"]: name for name, stage in lock.items() for out in stage.get("outs", [])}
    found = {
        f"{path} (not in dvc.lock)"
        for path in results
        if path not in made_by and (root / path).exists()
    }
    found |= {f"{path} (edited)" for path in edited_results(root, results, None)}
    waiting = [made_by[path] for path in results if path in made_by]
    stages: set[str] = set()
    while waiting:
        if (name := waiting.pop()) not in stages:
            stages.add(name)
            deps = [dep["path"] for dep in lock[name].get("deps", [])]
            waiting += [made_by[path] for path in deps if path in made_by]
    read = cache(lambda file: read_yaml(root, file, None))
    for name in stages:
        found |= _changed_params(lock[name], read)
        found |= _changed_deps(root, lock, made_by, name)
    if not found:
        return []
    listed = ", ".join(sorted(found)[:_LISTED])
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return [
        f"the results are stale: dvc.lock records other contents of {listed}{more}; run `dvc repro`"
    ]


def _changed_params(stage: Mapping[str, Any], read: Callable[[str], Any]) -> set[str]:
    found = set()
    for file, values in stage.get("params", {}).items():
        now = read(file)
        for key, recorded in values.items():
            if _lookup(now, key) != recorded:
                found.add(f"{file}: {key}")
    return found


def _lookup(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


def _changed_deps(
    root: Path, lock: Mapping[str, Any], made_by: Mapping[str, str], name: str
) -> set[str]:
    found = set()
    for dep in lock[name].get("deps", []):
        path, recorded = dep["path"], dep.get("md5")
        if path in made_by:
            outs = {out["path"]: out["md5"] for out in lock[made_by[path]]["outs"]}
            same = outs[path] == recorded
        elif recorded is None or recorded.endswith(".dir"):  # a dataset outside the repository
            continue
        else:
            content = read_bytes(root, path, None)
            same = content is not None and _md5(content) == recorded
        if not same:
            found.add(path)
    return found


def _read_lock(root: Path, commit: str | None) -> dict[str, Any]:
    content = read_yaml(root, "dvc.lock", commit)
    try:
        return dict(content["stages"])
    except (LookupError, TypeError, ValueError) as error:
        raise UserError("dvc.lock is missing or has no stages: run `dvc repro`.") from error


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
