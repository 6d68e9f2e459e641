"""Whether results belong to the code, data and parameters of a tree, as dvc.lock records."""

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from facegender.errors import UserError, reason_of
from facegender.runtime.git import read_bytes, read_yaml
from facegender.runtime.integrity import dvc_md5, recorded_outs

_LISTED = 5


def edited_results(root: Path, paths: Collection[str] | None, commit: str | None) -> list[str]:
    """Return the results whose bytes are not those that dvc.lock records.

    Args:
        paths: results to check; None for every one that is a file there.
        commit: the commit whose dvc.lock and results are read; None for the work tree.

    Raises:
        UserError: dvc.lock is unreadable.
    """
    edited = []
    for path, recorded in recorded_outs(_read_lock(root, commit)).items():
        if paths is None or path in paths:
            content = read_bytes(root, path, commit)
            if content is None:
                continue
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != recorded:
                edited.append(path)
    return edited


def why_stale(root: Path, results: Collection[str]) -> list[str]:
    """Return why results do not match the code and parameters of the work tree; empty if they do.

    The results, and parameters, code and command of every stage that they depend on, are compared
    with dvc.lock. Of data only what dvc.lock records is compared: the clone need not hold them.

    Raises:
        UserError: dvc.lock, dvc.yaml or a file of parameters is unreadable.
    """
    lock = _read_lock(root, None)
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
    commands = _commands(read("dvc.yaml") or {}, read("params.yaml") or {})
    for name in stages:
        if name in commands and lock[name].get("cmd", commands[name]) != commands[name]:
            found.add(f"dvc.yaml: the command of {name}")
        found |= _changed_params(lock[name], read)
        found |= _changed_deps(root, lock, made_by, name)
    if not found:
        return []
    listed = ", ".join(sorted(found)[:_LISTED])
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return [
        f"the results are stale: dvc.lock records other contents of {listed}{more}; run `dvc repro`"
    ]


def _commands(pipeline: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return each stage's command as dvc.lock records it, except of `foreach` stages.

    Raises:
        UserError: a command names a variable that is not defined.
    """
    from dvc.exceptions import DvcException
    from dvc.parsing.context import Context

    variables = dict(params)
    for each in pipeline.get("vars", []):
        variables |= each if isinstance(each, dict) else {}
    context, stages = Context(variables), pipeline.get("stages", {})
    try:
        return {name: context.resolve(one["cmd"]) for name, one in stages.items() if "cmd" in one}
    except DvcException as error:
        raise UserError(
            f"Cannot read the commands in dvc.yaml: {error}. Correct it, or restore it with "
            "`git checkout HEAD dvc.yaml`."
        ) from error


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
        elif recorded is None or _is_absent_data(root, path):
            continue
        else:
            same = _md5_of_path(root, path) == recorded
        if not same:
            found.add(path)
    return found


def _is_absent_data(root: Path, path: str) -> bool:
    """Return whether a path is outside the repository and not a file: a clone need not hold it."""
    outside = os.path.relpath(root / path, root).startswith(os.pardir)
    return outside and not (root / path).is_file()


def _md5_of_path(root: Path, path: str) -> str | None:
    """Return DVC's MD5 of a file or directory, or None if it is missing."""
    try:
        return dvc_md5(root / path) if (root / path).exists() else None
    except OSError as error:
        raise UserError(
            f"Cannot read {path} of the work tree: {reason_of(error)}. Check its permissions."
        ) from error


def _read_lock(root: Path, commit: str | None) -> dict[str, Any]:
    content = read_yaml(root, "dvc.lock", commit)
    try:
        return dict(content["stages"])
    except (LookupError, TypeError, ValueError) as error:
        raise UserError("dvc.lock is missing or has no stages: run `dvc repro`.") from error
