"""Check that the installed packages are the pinned ones, which DVC watches."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from facegender.errors import UserError
from facegender.files import parse_yaml


def check_packages(pinned: Path) -> None:
    """Refuse installed packages that differ from the pinned ones.

    DVC reruns a stage when a pinned version changes. Results of another version would pass for
    those of the pinned one.

    Args:
        pinned: YAML file of names and lists of versions (conf/packages.yaml).

    Raises:
        UserError: a package differs; the message names all of them.
    """
    expected = parse_yaml(pinned.read_text(encoding="utf-8"))
    differing = ", ".join(
        f"{name} {installed} instead of {' or '.join(versions)}"
        for name, versions in expected.items()
        if (installed := _installed(name)) not in versions
    )
    if differing:
        raise UserError(
            f"The environment differs from {pinned.as_posix()}: {differing}. `make install` "
            "installs the locked versions; `make lock` locks newer ones, and the next `dvc repro` "
            "reruns the stages that use them."
        )


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
