"""The source `kaggle`: a dataset of class folders, fetched with the official client.

The client signs in, downloads and resumes. On its own, it waits forever for a silent server, gives
up at the first HTTP error, accepts a damaged archive, and prints signed URLs (and tokens, if
VERBOSE is set). It also signs in on import, so it is imported in a function.
"""

import io
import json
import logging
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests
import urllib3
from filelock import FileLock, Timeout

from facegender.data.sources.archive import ArchiveLimits, DamagedArchive, extract_archive
from facegender.data.sources.raw_directory import clear_directory
from facegender.errors import UserError
from facegender.files import file_sha256, write_atomically

if TYPE_CHECKING:
    from kaggle.api.kaggle_api_extended import KaggleApi

_log = logging.getLogger(__name__)

_LONGEST_WAIT = 120.0  # seconds; if the server asks for more, this is an error
_SITE = "https://www.kaggle.com"
_GET_TOKEN = (
    f"Create a token at {_SITE}/settings/api and set KAGGLE_API_TOKEN to it, or save it as "
    "~/.kaggle/access_token; docs/own-data.md lists the other ways."
)
_NO_CREDENTIALS = "Kaggle credentials are missing."
_REFUSED_TOKEN = "Kaggle does not accept the access token: it expired or was revoked."  # noqa: S105
_BAD_CREDENTIALS = (
    "The Kaggle credentials cannot be used: their file cannot be read or is malformed, or a token "
    "holds a line break or another invalid character, or has more than 255 characters, when it "
    "must be in a file."
)
_NO_CONFIG_DIRECTORY = "The Kaggle client cannot make its configuration directory."
_RUN_AGAIN = "run the same command again: it resumes the download."


@dataclass(frozen=True)
class KaggleDownload:
    """A finished download.

    Attributes:
        version: number, or None if neither the caller nor Kaggle named one.
        archive_sha256: SHA-256 of the archive as it came.
    """

    slug: str
    version: int | None
    archive_sha256: str


@dataclass(frozen=True)
class _Failure:
    """Why an attempt failed, what the user can do, and whether another attempt may succeed."""

    problem: str
    advice: str
    transient: bool = False
    wait: float | None = None  # seconds until then, if the server said


def download_kaggle(
    slug: str,
    version: int | None,
    target: Path,
    limits: ArchiveLimits,
    *,
    cache: Path,
    expected_sha256: str | None = None,
    expected_version: int | None = None,
    attempts: int = 4,
    delay: float = 2.0,
    timeout: float = 60.0,
) -> KaggleDownload:
    """Download a dataset from Kaggle and unpack it into the empty directory `target`.

    The client finds the credentials: see docs/own-data.md. They never appear in a message, log or
    exception of this function.

    Args:
        slug: `owner/name` of the dataset, the end of its address.
        version: number of a version; None for the newest.
        target: empty directory, created if missing; empty again on failure.
        cache: directory where an unfinished download stays for the next call to resume.
        expected_sha256: `archive_sha256` of an earlier download.
        expected_version: version of that download; another version may have other bytes.
        attempts: largest number of attempts while failures may be transient.
        delay: seconds before the second attempt, doubled for each later one.
        timeout: seconds without a byte after which a connection counts as broken.

    Raises:
        UserError: the dataset is unavailable, or has changed; says what to do.
        ValueError: the target is not empty.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+/[A-Za-z0-9_-]+", slug):
        raise UserError(
            f"{slug!r} is not the name of a Kaggle dataset. Set dataset.slug to the end of its "
            f"address, `owner/name` of {_SITE}/datasets/owner/name."
        )
    folder = cache / slug.replace("/", "--")
    damaged = 0
    with _locked(cache):
        for attempt in range(1, attempts + 1):
            got = _fetch(slug, version, folder, timeout, limits.max_total_bytes)
            if not isinstance(got, _Failure):
                version, archive = got
                try:
                    digest = file_sha256(archive)
                    extract_archive(archive, target, limits)
                    break
                except DamagedArchive as error:
                    # Perhaps two halves that do not match: try once more, from the start.
                    shutil.rmtree(folder)
                    damaged += 1
                    got = _Failure(
                        f"What Kaggle sent as {_title(slug, version)} is not a sound archive. "
                        f"{error}",
                        "If that does not help, pin another version of the dataset.",
                        transient=damaged == 1,
                    )
            if not got.transient or attempt == attempts:
                raise UserError(f"{got.problem} {got.advice}")
            wait = delay * 2 ** (attempt - 1) if got.wait is None else got.wait
            _log.info(
                "%s Attempt %d of %d in %.0f seconds.", got.problem, attempt + 1, attempts, wait
            )
            time.sleep(wait)
        shutil.rmtree(folder)
    same_version = expected_version is None or version == expected_version
    if same_version and expected_sha256 not in {None, digest}:
        clear_directory(target)
        raise UserError(
            f"The bytes of {_title(slug, version)} differ from the last download: the "
            f"archive's SHA-256 was {expected_sha256} and is {digest}. To accept the change, "
            "delete data/raw.json and run again; if you expect none, ask the dataset's owner."
        )
    return KaggleDownload(slug, version, digest)


def _title(slug: str, version: int | None) -> str:
    return slug if version is None else f"{slug}, version {version}"


def _fetch(
    slug: str, version: int | None, folder: Path, timeout: float, max_bytes: int
) -> tuple[int | None, Path] | _Failure:
    """Make the dataset's archive complete in `folder`; return its version and its path.

    An archive of more than `max_bytes` is refused before its first byte.

    A failure is returned, not raised: the client's exceptions may hold a token or a signed URL
    and must not become the context of ours.
    """
    try:
        client = _sign_in(timeout, max_bytes)
        if version is None:
            with _silence():
                status = client.dataset_status(slug, format="json(current_version_number)")
            version = json.loads(status)["current_version_number"] or None
        # One folder for each version, because the client takes any file that is as large as the
        # dataset, and newer, for the dataset.
        version_folder = folder / str(version or "newest")
        archive = version_folder / f"{slug.rpartition('/')[2]}.zip"
        if version is None:
            shutil.rmtree(version_folder, ignore_errors=True)
        version_folder.mkdir(parents=True, exist_ok=True)
        _log.info("Downloading %s from Kaggle", _title(slug, version))
        with _silence(stderr=False):
            client.dataset_download_files(
                slug if version is None else f"{slug}/{version}",
                path=str(version_folder),
                quiet=not sys.stderr.isatty(),
            )
        return version, archive
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        if type(error) is ValueError:
            # The client wrote something of the wrong size into the archive, perhaps an error page,
            # and would resume from there.
            shutil.rmtree(folder, ignore_errors=True)
        return _explain(error, slug, version)


def _sign_in(timeout: float, max_bytes: int) -> "KaggleApi":
    """Return a client that has found credentials, retries nothing and waits `timeout` seconds.

    Raises:
        UserError: credentials are missing or cannot be used.
        requests.RequestException: Kaggle cannot be reached to check an access token.
    """
    trouble, advice = _NO_CREDENTIALS, _GET_TOKEN
    with _silence(), _private_files():
        try:
            client = _make_client(timeout, max_bytes)
        except OSError:
            trouble = _NO_CONFIG_DIRECTORY
            advice = "Set KAGGLE_CONFIG_DIR to a directory that can be written."
        else:
            try:
                client.authenticate()
                return client
            except requests.RequestException:
                raise
            except SystemExit:
                from kagglesdk import get_access_token_from_env

                if get_access_token_from_env()[0]:
                    trouble = _REFUSED_TOKEN
            except Exception:  # the client does not check what it reads, so it may raise anything
                trouble = _BAD_CREDENTIALS
    raise UserError(f"{trouble} {advice}")


def _make_client(timeout: float, max_bytes: int) -> "KaggleApi":
    with _no_requests():
        from kaggle.api.kaggle_api_extended import KaggleApi

    class Client(KaggleApi):
        # --verbose, which VERBOSE in the environment sets, prints the Authorization header and
        # reads the whole archive into memory.
        args = [arg for arg in KaggleApi.args if arg not in {"--verbose", "-v"}]  # noqa: RUF012

        def build_kaggle_client(self) -> Any:
            client = super().build_kaggle_client()
            http = client.http_client()
            http._init_session()
            for scheme in ("https://", "http://"):
                http._session.mount(scheme, _Adapter(timeout))
            return client

        def download_file(self, response: Any, *args: Any, **kwargs: Any) -> None:
            size = int(response.headers.get("Content-Length") or 0)
            if size > max_bytes:
                raise UserError(
                    f"Nothing was downloaded: Kaggle's archive has {size:,} bytes, and its content "
                    f"may have {max_bytes:,}. Raise archive.max_gigabytes if there is room for "
                    "three times its size, or choose another dataset."
                )
            # The client's retries use the same signed URL for minutes; ours get a new one.
            super().download_file(response, *args, **kwargs, max_retries=0, timeout=timeout)

    return Client()


class _Adapter(requests.adapters.HTTPAdapter):
    """Gives the client's requests a timeout in seconds, because the client sets none."""

    def __init__(self, timeout: float) -> None:
        super().__init__()
        self._timeout = timeout

    def send(self, request: Any, *args: Any, **kwargs: Any) -> requests.Response:
        return super().send(request, *args, **{**kwargs, "timeout": self._timeout})


@contextmanager
def _no_requests() -> Iterator[None]:
    """Block the network for the client, which signs in on import and drops the result."""
    from kagglesdk.kaggle_http_client import KaggleHttpClient

    def refuse(*_: object) -> None:
        raise requests.ConnectionError

    call = KaggleHttpClient.call
    KaggleHttpClient.call = refuse
    try:
        yield
    finally:
        KaggleHttpClient.call = call


@contextmanager
def _private_files() -> Iterator[None]:
    """Create new files for the user only: the client restricts its credentials too late."""
    umask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(umask)


@contextmanager
def _silence(*, stderr: bool = True) -> Iterator[None]:
    """Drop what the client prints and logs; `stderr=False` keeps its progress bar."""
    loggers = [logging.getLogger(name) for name in ("kaggle", "kagglesdk", "urllib3", "requests")]
    levels = [logger.level for logger in loggers]
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))
        if stderr:
            stack.enter_context(redirect_stderr(io.StringIO()))
        for logger, level in zip(loggers, levels, strict=True):
            stack.callback(logger.setLevel, level)
            logger.setLevel(logging.CRITICAL + 1)
        yield


def _explain(error: Exception, slug: str, version: int | None) -> _Failure:
    """Describe an exception of the client without its message, which may hold secrets."""
    kind = type(error).__name__
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return _explain_answer(error.response, slug, version)
    if isinstance(error, requests.exceptions.InvalidHeader | UnicodeError):
        return _Failure(_BAD_CREDENTIALS, _GET_TOKEN)
    if isinstance(
        error,
        requests.ConnectionError
        | requests.Timeout
        | requests.exceptions.ChunkedEncodingError
        | urllib3.exceptions.HTTPError
        | ConnectionError
        | TimeoutError,
    ):
        return _Failure(
            f"The connection to Kaggle failed or broke off ({kind}).",
            f"Check the network, and the proxy if there is one, and {_RUN_AGAIN}",
            transient=True,
        )
    if isinstance(error, requests.exceptions.InvalidJSONError) or type(error) is ValueError:
        return _Failure(
            f"Kaggle sent something other than it announced ({kind}).",
            "Run the same command again later.",
            transient=True,
        )
    if isinstance(error, requests.RequestException):
        return _Failure(
            f"The Kaggle client cannot make its request ({kind}).", "Check the proxy settings."
        )
    if isinstance(error, OSError):
        return _Failure(
            f"The download from Kaggle cannot be stored: {error.strerror}.",
            f"Make room on the disk, or fix the permissions of .dvc/tmp, and {_RUN_AGAIN}",
        )
    raise error


def _explain_answer(response: requests.Response, slug: str, version: int | None) -> _Failure:
    status = response.status_code
    if status < 400:
        status = response.json()["code"]  # what the client raised for
    title = _title(slug, version)
    page = f"{_SITE}/datasets/{slug}"
    wait = _retry_after(response)
    soon = wait is None or wait <= _LONGEST_WAIT
    patience = "some minutes" if wait is None else f"{wait:.0f} seconds"
    if status == 429:
        return _Failure(
            "Kaggle received too many requests from this address (429).",
            f"Wait for {patience} and {_RUN_AGAIN}",
            transient=soon,
            wait=wait,
        )
    if status >= 500 or status == 408 or response.history:
        # After a redirect, the storage behind Kaggle answers; a new link may help.
        return _Failure(
            f"Kaggle failed (HTTP {status}).",
            f"Wait for {patience} and {_RUN_AGAIN}",
            transient=soon,
            wait=wait,
        )
    if status == 401:
        return _Failure(
            "Kaggle does not accept the credentials (401).",
            "An access token takes precedence over kaggle.json: remove the token to use the file. "
            + _GET_TOKEN,
        )
    if status == 403:
        return _Failure(
            f"Kaggle does not let this account download {title} (403).",
            f"Open {page} in a browser, signed in, and accept the terms if it asks you to. If the "
            "page is not found, the dataset is private or dataset.slug is misspelt.",
        )
    if status == 404:
        return _Failure(
            f"Kaggle does not have the dataset {title} (404).",
            f"Compare dataset.slug and dataset.version with {page}, and choose another dataset "
            "if it is gone.",
        )
    return _Failure(
        f"Kaggle refused the request for {title} (HTTP {status}).",
        f"Check that {page} opens in a browser; a newer `kaggle` package may help.",
    )


def _retry_after(response: requests.Response) -> float | None:
    """Return the seconds that the server asks to wait, or None if it does not."""
    try:
        return urllib3.Retry().parse_retry_after(response.headers["Retry-After"])
    except (KeyError, urllib3.exceptions.InvalidHeader):
        return None


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of `directory`, which parallel experiments share; log which process has it."""
    directory.mkdir(parents=True, exist_ok=True)
    owner, lock = directory / "owner", FileLock(directory.with_name(f"{directory.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        who = "another process"
        with suppress(FileNotFoundError):  # the other process has just ended
            who = owner.read_text(encoding="utf-8")
        _log.info("waiting for %s, which downloads to %s", who, directory)
        lock.acquire()
    try:
        write_atomically(owner, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
