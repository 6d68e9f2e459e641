"""Remove credentials and control characters from text before it is printed or stored."""

import logging
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from urllib.parse import unquote, urlsplit

_BLANK = "***"
_SECRET_NAME = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|CONNECTION_STRING|(?:^|_|API)KEY(?:_|$)"
    r"|(?:^|_)(?:PASS|PAT)(?:_|$)|_PWD$",
    re.IGNORECASE,
)
_SHORTEST_SECRET = 6  # characters; blanking a shorter value would garble the text
# Names in addresses, in quotes and before an equals sign. `key` alone is not secret in the latter.
_IN_ADDRESS = re.compile(r"(?i)token|key|secret|sig|passw|credential")
_IN_TEXT = re.compile(
    r"(?i)token(?!s|iz)|secret|passw|passphrase|credential|signature|(?:api|access|private)_?key"
    r"|(?:^|_)(?:pass|pwd|pat)$"
)
# Each takes time in proportion to the text: what repeats starts at a fixed sign and stays within a
# word or a pair of quotes. Groups: name, what stands between, value.
_PATTERNS = (
    # https://user:password@host
    (None, re.compile(r"(?<=://)()()([^/\s\"]+)(?=@)")),
    # https://host/file?X-Goog-Signature=...
    (_IN_ADDRESS, re.compile(r"(?<=[?&])([\w.-]+)(=)([^&\s\"']+)")),
    # {"access_token": "..."}, also within a quoted text, where quotes have a backslash
    (
        _IN_TEXT,
        re.compile(
            r"(?<=[\"'])([\w.-]+)(\\*[\"']\s{0,9}:\s{0,9}(?P<quote>\\*[\"']))"
            r"((?:\\.|[^\\\n])*?)(?=(?P=quote))"
        ),
    ),
    # password='...' of libpq; DB_PASS=... of a shell
    (
        _IN_TEXT,
        re.compile(
            r"(?<![\w.-])([\w.-]+)(=)('(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"|[^\s&\"',;)]+)"
        ),
    ),
    # Authorization: Bearer ...; a digit or sign distinguishes a value from an English word.
    (None, re.compile(r"\b(Bearer|Basic)(\s{1,9})(?=[\w.~+/=-]*[\d=_~+/-])([\w.~+/=-]{6,})")),
)


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Return the secret values among environment variables.

    These are the values of variables named like a secret (`KAGGLE_KEY`, `AWS_SESSION_TOKEN`), and
    the passwords in addresses (`http_proxy=http://user:password@host`), as written and decoded.
    """
    found = {value for name, value in environment.items() if _SECRET_NAME.search(name)}
    for value in environment.values():
        found.update(_passwords(value))
    return sorted(secret for secret in found if len(secret) >= _SHORTEST_SECRET)


def _passwords(address: str) -> Iterator[str]:
    try:
        password = urlsplit(address).password
    except ValueError:  # not an address
        return
    if password:
        yield password
        yield unquote(password)


def without_credentials(text: str, secrets: Sequence[str] = ()) -> str:
    """Return the text with secrets blanked: the given ones, and those in addresses and headers."""
    # The longest first, because one may contain another.
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, _BLANK)
    for names, pattern in _PATTERNS:

        def blanked(match: re.Match[str], names: re.Pattern[str] | None = names) -> str:
            name, between = match[1], match[2]
            # PWD=/home/ada is the shell's working directory.
            keep = names is not None and (not names.search(name) or name == "PWD")
            return match[0] if keep else f"{name}{between}{_BLANK}"

        text = pattern.sub(blanked, text)
    return text


def first_line(error: Exception, secrets: Sequence[str]) -> str:
    """Return an error's first line without credentials: SQLAlchemy adds the SQL on more lines."""
    return without_credentials(str(error), secrets).partition("\n")[0]


def move_tracking_credentials(environment: MutableMapping[str, str]) -> None:
    """Move name and password from MLflow's server address into its variables for them.

    MLflow prints the address when a run ends, and repeats it in errors. As in `requests`, which it
    uses, credentials in the address take precedence over the variables. A database's address stays
    unchanged: MLflow has no variable for its password.
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
    """Return the text without credentials and without control characters, ready to be shown.

    Libraries' error messages contain addresses with passwords, and file names from an archive may
    contain anything, such as a terminal's escape sequences.
    """
    blanked = without_credentials(text, secrets_of(os.environ))
    return "\n".join(escape_controls(line) for line in blanked.split("\n"))


def escape_controls(text: str) -> str:
    """Return the text with unprintable characters written as escapes, such as `\\x1b`.

    Among them are line breaks, marks that change the direction of writing, and undecodable bytes of
    a file name.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


class SanitizingFormatter(logging.Formatter):
    """A formatter whose lines are `sanitized`."""

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        return sanitized(super().format(record))
