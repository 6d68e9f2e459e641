"""Files on disk: digests, atomic writes, YAML."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it: it is never half-written."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(files: Sequence[Path], text: str) -> str:
    """Return one SHA-256 for the contents of files and a text."""
    parts = [file_sha256(path) for path in files]
    return hashlib.sha256("\n".join([*parts, text]).encode()).hexdigest()


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML text. Raises ruamel.yaml.YAMLError if it is malformed.

    With DVC's own parser. That of PyYAML is faster, but takes the 1e-07 that DVC writes for a text.
    """
    from ruamel.yaml import YAML  # here, so that quick commands start fast

    return YAML(typ="safe").load(text)
