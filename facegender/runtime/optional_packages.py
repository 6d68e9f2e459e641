"""Hide packages that other packages import if they can, and that a stage does not use."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_packages(*names: str) -> Iterator[None]:
    """Make packages look uninstalled to imports in the body, unless they are imported already.

    Keras imports Matplotlib and scikit-learn for functions that are not used here. They take more
    than a quarter of its import time.
    """
    hidden = [name for name in names if name not in sys.modules]
    # Documented: an import raises ModuleNotFoundError if sys.modules has None for its name.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
