"""The error that the user can fix."""


class UserError(Exception):
    """Error the user can fix; shown without a traceback.

    The message is one paragraph: what is wrong, and what to do next. Entry points print it and
    exit with code 1. Every other exception is a bug and keeps its traceback.
    """
