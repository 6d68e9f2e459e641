"""`facegender verify`."""

import argparse
import sys

from facegender.errors import UserError
from facegender.runtime.dvc_context import project_root
from facegender.runtime.redaction import escape_controls


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Hash every output recorded in dvc.lock, in the work tree and in DVC's cache. Damaged "
        "objects are removed from the cache, so that `dvc repro` makes them again or `dvc pull` "
        "fetches them. Exit code 1 if something was damaged."
    )
    parser.add_argument(
        "--remote",
        nargs="?",
        const="",
        metavar="NAME",
        help="also fetch and hash the objects of a DVC remote (default: DVC's default remote), "
        "and remove damaged ones from it, so that `dvc push` sends them again",
    )
    parser.set_defaults(run=verify)


def verify(args: argparse.Namespace) -> int:
    """Hash the outputs and name the damaged ones."""
    # Imports DVC, which takes half a second.
    from facegender.runtime import integrity

    root = project_root()
    checked, missing, damaged = integrity.verify(root, args.remote)
    for item in damaged:
        print(f"{escape_controls(item.path)}: damaged {item.location} (object {item.name})")
    for name in integrity.unverified_remotes(root):
        print(
            f"warning: DVC does not check what the remote {name} sends. To have it check: "
            f"`dvc remote modify {name} verify true`.",
            file=sys.stderr,
        )
    if missing:
        print(
            f"not checked: {missing} files and directories are in neither the work tree nor DVC's "
            "cache; `dvc pull` fetches them, or `dvc repro` makes them",
            file=sys.stderr,
        )
    if damaged:
        raise UserError(
            "The files named above are not what dvc.lock records. `dvc repro` makes them again, or "
            "`dvc pull` fetches them from an undamaged remote; `dvc push` then repairs a remote."
        )
    print(f"{checked} files and directories match dvc.lock")
    return 0
