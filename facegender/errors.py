"""The error that the user can fix."""

from collections.abc import Mapping


class UserError(Exception):
    """Error the user can fix; shown without a traceback.

    The message is one paragraph: what is wrong, and what to do next. Entry points print it and
    exit with code 1. Every other exception is a bug and keeps its traceback.
    """


def reason_of(error: Exception) -> str:
    """Return in one line why a file cannot be read, from an error of the system or of YAML."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}: {getattr(error, 'problem', None) or 'it is not YAML'}"
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def listed(reasons: Mapping[str, str]) -> str:
    """Return the first ten reasons, each after its path."""
    return "; ".join(f"{path!r} {reason}" for path, reason in list(reasons.items())[:10])
