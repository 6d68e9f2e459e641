"""Files that DVC stores, by the MD5 in dvc.lock: in its cache, or else in the default remote."""

import json
from pathlib import Path

from facegender.errors import UserError
from facegender.runtime.integrity import dvc_md5


def stored_file(root: Path, md5: str) -> Path:
    """Return the path of an object in DVC's cache, fetched from the default remote if it lacks it.

    Args:
        md5: DVC's MD5 of a file, or of a directory, whose object is a listing.

    Raises:
        UserError: neither has it, the remote cannot be read, or the object is damaged.
    """
    from dvc.config import NoRemoteError
    from dvc.repo import Repo
    from dvc_data.hashfile.hash_info import HashInfo

    with Repo(str(root)) as repo:
        path = Path(repo.cache.local.oid_to_path(md5))
        if not path.is_file():
            try:
                repo.cloud.pull([HashInfo("md5", md5)])
            except NoRemoteError:
                raise UserError("DVC's cache lacks it, and there is no default remote") from None
            except Exception as error:  # each kind of storage has its own errors
                raise UserError(
                    f"DVC's cache lacks it, and the remote cannot be read: {error}"
                ) from error
    if not path.is_file():
        raise UserError("neither DVC's cache nor the default remote has it")
    if dvc_md5(path) != md5.removesuffix(".dir"):
        raise UserError("its object in DVC's cache is damaged; `facegender verify` says more")
    return path


def stored_directory(root: Path, md5: str) -> dict[str, Path]:
    """Return the files of a directory by their paths in it; raises as `stored_file` does."""
    listing = json.loads(stored_file(root, md5).read_text(encoding="utf-8"))
    return {entry["relpath"]: stored_file(root, entry["md5"]) for entry in listing}
