"""The one exception that a person is meant to read."""


class UserError(Exception):
    """Something the person running the command can put right.

    The message is one paragraph that names what is wrong and what to do next. Entry points
    print it without a traceback and exit with code 1; every other exception is a bug and
    keeps its traceback.
    """
