"""A small text inside a model's file, stored as TFLite's associated files are.

It is in a ZIP archive behind the model, which the runtime ignores; `unzip -p` prints it. A .keras
file is itself a ZIP archive and gets one more member.
"""

import zipfile
import zlib
from pathlib import Path

_MAX_BYTES = 10_000


def attach(path: Path, name: str, text: str) -> None:
    """Add a text to a model's file; the same text gives the same bytes."""
    with zipfile.ZipFile(path, "a") as archive:
        # ZipInfo's own date is a constant.
        archive.writestr(zipfile.ZipInfo(name), text)


def attached(path: Path, name: str) -> str | None:
    """Return a text of a model's file, or None if it has none.

    Raises:
        ValueError: the text is too long, or damaged.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name) as member:
            content = member.read(_MAX_BYTES + 1)
    except KeyError:
        return None
    # RuntimeError: the member is encrypted, or zipfile does not know its compression.
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error)) from error
    if len(content) > _MAX_BYTES:
        raise ValueError("too long")
    return content.decode()
