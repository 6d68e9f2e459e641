"""Types of command-line arguments; argparse turns their errors into a usage message."""

import argparse
import math
from pathlib import Path


def probability(text: str) -> float:
    """Return a probability from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def whole_number(text: str) -> int:
    """Return a whole number of 1 or more."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return int(text)


def non_empty(text: str) -> str:
    """Return the text without surrounding white space."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text.strip()


def folder_path(text: str) -> Path:
    """Return a path. `Path` takes an empty text, such as an unset variable, for this folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


def setting(text: str) -> tuple[str, str]:
    """Return key and value of KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text} is not KEY=VALUE")
    return key, value
