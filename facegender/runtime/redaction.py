"""Credentials: blanked in what is printed or kept, and taken out of addresses."""

import logging
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from urllib.parse import unquote, urlsplit

_BLANK = "***"
_SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|CREDENTIAL|CONNECTION_STRING|(?:^|_|API)KEY(?:_|$)", re.IGNORECASE
)
_SHORTEST_SECRET = 6  # characters; blanking a shorter value would garble the text
_PATTERNS = (
    # https://user:password@host
    re.compile(r"(?<=://)[^/\s\"]+(?=@)"),
    # https://host/file?X-Goog-Signature=...
    re.compile(
        r"(?i)(?<=[?&])([\w.-]*(?:token|key|secret|sig|password|credential)[\w.-]*=)[^&\s\"']+"
    ),
    # Authorization: Bearer ...; a digit or a sign tells a value from an English word.
    re.compile(r"\b((?:Bearer|Basic)\s+)(?=\S*[\d=_~+/-])[\w.~+/=-]{6,}"),
)


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Return the secret values of variables, as their names and forms tell.

    They are the values of variables whose names say so (`KAGGLE_KEY`, `AWS_SESSION_TOKEN`), and
    the passwords in addresses (`http_proxy=http://user:password@host`), as written and decoded.
    """
    found = {value for name, value in environment.items() if _SECRET_NAME.search(name)}
    for value in environment.values():
        found.update(_passwords(value))
    return sorted(secret for secret in found if len(secret) >= _SHORTEST_SECRET)


def _passwords(address: str) -> Iterator[str]:
    try:
        password = urlsplit(address).password
    except ValueError:  # no address, though it looked like one
        return
    if password:
        yield password
        yield unquote(password)


def without_credentials(text: str, secrets: Sequence[str] = ()) -> str:
    """Return the text with secrets blanked: those given, and what addresses and headers hold."""
    # The longest first, for one may be part of another.
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, _BLANK)
    for pattern in _PATTERNS:
        text = pattern.sub(lambda match: (match[1] if match.re.groups else "") + _BLANK, text)
    return text


def move_tracking_credentials(environment: MutableMapping[str, str]) -> None:
    """Move name and password from MLflow's address into the variables that it has for them.

    MLflow prints the address of a run when the run ends, and repeats its server's address in
    errors. As with `requests`, which it asks, those in the address come before the variables.
    The address of a database stays as it is, for there is no other place for its password.
    """
    address = environment.get("MLFLOW_TRACKING_URI", "")
    scheme, _, rest = address.partition("://")
    server, slash, path = rest.partition("/")
    login, at, host = server.rpartition("@")
    if scheme.lower() not in {"http", "https"} or not at:
        return
    environment["MLFLOW_TRACKING_URI"] = f"{scheme}://{host}{slash}{path}"
    name, colon, password = login.partition(":")
    if colon:
        environment["MLFLOW_TRACKING_USERNAME"] = unquote(name)
        environment["MLFLOW_TRACKING_PASSWORD"] = unquote(password)


def sanitized(text: str) -> str:
    """Return the text as it may be shown: without credentials, and nothing in it moves a cursor.

    Error messages of libraries hold addresses with passwords; names of files that came in an
    archive hold what their maker liked, escape sequences of terminals too.
    """
    blanked = without_credentials(text, secrets_of(os.environ))
    return "\n".join(escape_controls(line) for line in blanked.split("\n"))


def escape_controls(text: str) -> str:
    """Return the text with characters that are not printable written as escapes, such as `\\x1b`.

    Among them are line breaks, marks that turn the direction of writing, and bytes of a file's
    name that are no text.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


class SanitizingFormatter(logging.Formatter):
    """A formatter whose lines are `sanitized`."""

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        return sanitized(super().format(record))
