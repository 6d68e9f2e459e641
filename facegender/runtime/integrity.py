"""Checks that files are, byte for byte, what dvc.lock records, because DVC trusts many unchecked.

DVC hashes a file once and then recognizes it by time, size and inode. It trusts the name of an
object that a remote without `verify` sends, and of every read-only object in its cache. So data
damaged in a remote, in transit or in a shared cache counts as unchanged.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from facegender.errors import UserError
from facegender.files import parse_yaml

WORK_TREE = "in the work tree"
CACHE = "in DVC's cache"

_DOWNLOADS = 8  # in parallel; most objects are small
_LISTED = 10
# What .dvcignore names.
_IGNORED = "__pycache__"
# Up to this size an output is hashed whole: DVC, which knows its files, takes a second to import.
_SMALL_BYTES = 500_000_000


@dataclass(frozen=True)
class Damage:
    """A file whose bytes differ from dvc.lock.

    Attributes:
        path: path of the file, relative to the repository.
        location: where the bytes are wrong.
        name: name of the object in a cache or remote, as a path under its `files/md5`.
    """

    path: str
    location: str
    name: str


def check_inputs(lock: Path, inputs: Sequence[Path]) -> None:
    """Refuse inputs that differ from dvc.lock, and accept any that it does not name.

    Of a large output only the inputs in it are hashed; of a small one all of it is.

    Args:
        lock: path of dvc.lock; if it does not exist, nothing is refused.
        inputs: files and directories: outputs of stages, or in such outputs.

    Raises:
        UserError: an input differs; the message names the damaged files.
    """
    root, recorded = lock.parent, _recorded(lock)
    wholes: set[str] = set()
    parts: dict[str, str] = {}  # outputs by the inputs in them
    for path in inputs:
        name = os.path.relpath(path, root)
        around = (name, *map(str, PurePosixPath(name).parents))
        output = next((one for one in around if one in recorded), None)
        if output is None or not path.exists():
            continue
        sizes = (file.stat().st_size for file in (root / output).rglob("*") if file.is_file())
        if output == name or sum(sizes) <= _SMALL_BYTES:
            wholes.add(output)
        else:
            parts[name] = output
    suspects = {name: recorded[name] for name in wholes if dvc_md5(root / name) != recorded[name]}
    if not suspects and not parts:
        return
    # Slow but exact: a directory may contain files that .dvcignore names.
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        objects = _objects(suspects, repo.cache.local)
        for name, output in parts.items():
            known = _objects({output: recorded[output]}, repo.cache.local)
            inside = {file: md5 for file, md5 in known.items() if f"{file}/".startswith(f"{name}/")}
            # Without DVC's listing only the hash of the whole is known.
            objects |= inside or known
        differing = _differing(root, objects)
    if differing:
        listed = ", ".join(differing[:_LISTED]) + (", ..." if len(differing) > _LISTED else "")
        raise UserError(
            f"Different from dvc.lock, though DVC takes it for unchanged: {listed}. Nothing is "
            "computed from it. `facegender verify` removes what is damaged; then `dvc repro` makes "
            "it again."
        )


def verify(root: Path, remote: str | None = None) -> tuple[int, int, list[Damage]]:
    """Hash everything that dvc.lock records in the work tree, the cache and optionally a remote.

    Damaged objects are removed from cache and remote. DVC then makes or fetches them again, and
    `dvc push` sends them again. Damaged files in the work tree stay, and DVC is made to hash them
    again.

    Args:
        remote: name of the remote; the empty string means the default one.

    Returns:
        Of the files and directories that dvc.lock records: how many are in the work tree or the
        cache, how many are in neither, and the damaged ones.

    Raises:
        UserError: dvc.lock does not exist, or the remote cannot be read.
    """
    from dvc.repo import Repo

    lock = root / "dvc.lock"
    if not lock.is_file():
        raise UserError(
            "dvc.lock is missing, so files cannot be compared with it: `dvc repro` makes it."
        )
    with Repo(str(root)) as repo:
        cache = repo.cache.local
        objects = _objects(_recorded(lock), cache)
        found = [
            Damage(path, WORK_TREE, _name(objects[path])) for path in _differing(root, objects)
        ]
        for damage in found:
            _make_dvc_look(root / damage.path)
        missing = 0
        for path, md5 in objects.items():
            file = Path(cache.oid_to_path(md5))
            if not file.is_file():
                missing += not (root / path).exists()
            elif _md5(file) != md5.removesuffix(".dir"):
                file.unlink()
                found.append(Damage(path, CACHE, _name(md5)))
        if remote is not None:
            found += _verify_remote(repo, remote, objects)
    return len(objects) - missing, missing, found


def _verify_remote(repo: Any, remote: str, objects: Mapping[str, str]) -> list[Damage]:
    name = remote or repo.config["core"].get("remote")
    if not name:
        raise UserError(
            "DVC has no default remote: name one with `--remote NAME` (`dvc remote list`)."
        )
    try:
        odb = repo.cloud.get_remote_odb(name, "verify")
        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            are_bad = pool.map(lambda md5: _is_bad(odb, md5), objects.values())
            bad = [path for path, is_bad in zip(objects, are_bad, strict=True) if is_bad]
        for path in bad:
            for parent in PurePosixPath(path).parents:
                # DVC pushes a directory's files only where its listing is missing.
                if (listing := objects.get(str(parent))) and odb.exists(listing):
                    odb.fs.remove(odb.oid_to_path(listing))
    except Exception as error:  # each kind of storage has its own errors
        raise UserError(
            f"The remote {name} cannot be read: {error}. docs/scaling-storage.md says how to "
            "set one up; S3 needs `pip install 'facegender[s3]'` or `make install-scale`."
        ) from error
    return [Damage(path, f"in the remote {name}", _name(objects[path])) for path in bad]


def unverified_remotes(root: Path) -> list[str]:
    """Return the names of the remotes whose objects DVC does not hash when it fetches them."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        remotes = repo.config["remote"]
        return [name for name, settings in remotes.items() if not settings.get("verify")]


def dvc_md5(path: Path) -> str:
    """Return DVC's MD5 of a file, or of a directory with its contents, without _IGNORED."""
    if path.is_file():
        return _md5(path)
    files = sorted(
        (file.relative_to(path).as_posix(), file)
        for file in path.rglob("*")
        if file.is_file() and _IGNORED not in file.relative_to(path).parts
    )
    # Hashing releases the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_md5, [file for _, file in files])
        entries = [
            {"md5": md5, "relpath": name} for (name, _), md5 in zip(files, digests, strict=True)
        ]
    listing = json.dumps(entries, sort_keys=True).encode()
    return f"{hashlib.md5(listing, usedforsecurity=False).hexdigest()}.dir"


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _recorded(lock: Path) -> dict[str, str]:
    """Return DVC's MD5 of each output that dvc.lock records, by its path."""
    if not lock.is_file():
        return {}
    return recorded_outs(parse_yaml(lock.read_text(encoding="utf-8"))["stages"])


def recorded_outs(stages: Mapping[str, Any]) -> dict[str, str]:
    """Return DVC's MD5 of each output of the stages in a dvc.lock, by its path."""
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}


def _objects(outs: Mapping[str, str], cache: Any) -> dict[str, str]:
    """Return the MD5 of each output and of each file in a directory, by path.

    If a directory's listing is missing from the cache or damaged, its files are unknown.
    """
    objects = dict(outs)
    for path, md5 in outs.items():
        listing = Path(cache.oid_to_path(md5))
        if md5.endswith(".dir") and listing.is_file() and _md5(listing) == md5.removesuffix(".dir"):
            for entry in json.loads(listing.read_text(encoding="utf-8")):
                objects[f"{path}/{entry['relpath']}"] = entry["md5"]
    return objects


def _differing(root: Path, objects: Mapping[str, str]) -> list[str]:
    """Return the paths that exist in the work tree and differ.

    A directory is compared as a whole if its files are unknown.
    """
    folders = {str(parent) for path in objects for parent in PurePosixPath(path).parents}
    return [
        path
        for path, md5 in objects.items()
        if path not in folders and (root / path).exists() and dvc_md5(root / path) != md5
    ]


def _make_dvc_look(path: Path) -> None:
    """Change the time of a file, or of all files in a directory, so that DVC hashes it again."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        try:
            os.utime(file)
        except PermissionError:  # a link into a shared cache
            file.unlink()


def _is_bad(odb: Any, md5: str) -> bool:
    """Return whether an object in a remote is damaged, and remove it there if it is."""
    from dvc_objects.errors import ObjectFormatError

    try:
        with suppress(FileNotFoundError):  # not pushed
            odb.check(md5)  # fetches it, hashes it, and removes it if it is damaged
    except ObjectFormatError:
        return True
    return False


def _name(md5: str) -> str:
    return f"{md5[:2]}/{md5[2:]}"
