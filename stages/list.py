"""Before stage 1: list a folder or archive on disk, for DVC to see when it changes."""

import argparse
import json
from pathlib import Path

from facegender.data.sources.archive import ArchiveLimits
from facegender.data.sources.folder import list_folder
from facegender.errors import UserError
from facegender.files import write_atomically
from facegender.params import FolderDataset, load_params
from facegender.runtime.dvc_context import project_root
from facegender.runtime.entry_points import run_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--listing", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--raw", type=Path, required=True, help="directory of the copy to come")
    args = parser.parse_args()
    params = load_params(args.params)
    if not isinstance(params.dataset, FolderDataset):
        raise UserError(f"Source {params.dataset.source} has nothing to list: set listed to [].")

    from dvc.repo import Repo
    from dvc_data.hashfile.hash import hash_file
    from dvc_objects.fs.local import LocalFileSystem

    root = project_root()
    with Repo(str(root)) as repo:

        def digest(path: Path) -> str:
            name = str(path.absolute())
            # DVC remembers the digests of files that stay as they are, if their names are text.
            state = repo.state if name.isprintable() else None
            return str(hash_file(name, LocalFileSystem(), "md5", state)[1].value)

        limits = ArchiveLimits.from_params(params.archive)
        listing = list_folder(params.dataset.path_from(root), args.raw, limits, digest)
    write_atomically(args.listing, json.dumps(listing, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    run_stage(main)
