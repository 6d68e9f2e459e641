"""Packages that others import if they are installed, and that a stage has no use for."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_packages(*names: str) -> Iterator[None]:
    """Have imports in the body not find some packages, unless they are imported already.

    Keras imports Matplotlib and scikit-learn, for functions that are not used here. They take more
    than a quarter of its import.
    """
    hidden = [name for name in names if name not in sys.modules]
    # As Python's documentation says of sys.modules: None has an import raise ModuleNotFoundError.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
