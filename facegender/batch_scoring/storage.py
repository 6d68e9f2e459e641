"""Folders of many files, local or in object storage, through fsspec.

Endpoint and credentials of object storage come from the standard environment of each machine
(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_PROFILE, ...) and are not stored.
"""

import errno
import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any

from facegender.data.image_files import PassedOver, is_litter, is_photo, walk_images
from facegender.data.images import InvalidImage
from facegender.errors import UserError

_log = logging.getLogger(__name__)

# An image is held in memory, and none is larger.
MAX_IMAGE_BYTES = 500_000_000
# Scheme of an address: its fsspec protocol, and the package that provides it.
_SCHEMES = {
    "s3": ("s3", "'facegender[s3]'"),
    "s3a": ("s3", "'facegender[s3]'"),
    "s3n": ("s3", "'facegender[s3]'"),
    "gs": ("gs", "gcsfs"),
    "az": ("az", "adlfs"),
}
# S3 error codes that concern one object; any other code concerns all of them.
_OBJECT_ERRORS = {
    "NoSuchKey": "no such file",
    "404": "no such file",
    "AccessDenied": "cannot be read: AccessDenied",
    "InvalidObjectState": "cannot be read: it is archived",
}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
# Packages whose errors concern the storage as a whole.
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure")


@dataclass(frozen=True)
class Storage:
    """A folder; other processes can use it if they reach the same address.

    Attributes:
        written: the address as the user wrote it, without a trailing slash.
        root: absolute path, or bucket and prefix.
    """

    written: str
    protocol: str
    root: str

    @property
    def is_local(self) -> bool:
        """Whether this is a folder of this machine."""
        return self.protocol == "file"

    @property
    def url(self) -> str:
        """The address in one form, however it was written."""
        return self.root if self.is_local else f"{self.protocol}://{self.root}"

    def photos(self) -> Iterator[str]:
        """Yield the names of all photos below, then log the number of other files.

        Objects are recognised by their names, local files also by their content.

        Raises:
            OSError: a folder cannot be listed. Its images would be missing from the plan, and a
                resumed run would not add them.
        """
        if self.is_local and Path(self.root).is_file():
            return  # a Parquet file, or unreadable
        passed_over, found = PassedOver(), False
        names = self._photo_objects(passed_over)
        if self.is_local:
            names = (str(path) for path in walk_images(Path(self.root), _refuse, passed_over))
        for name in names:
            found = True
            yield name
        # Without photos the input is Parquet.
        if found and (text := passed_over.text(self.written)):
            _log.info("%s", text)

    def _photo_objects(self, passed_over: PassedOver) -> Iterator[str]:
        for name in self._walk():
            path = PurePosixPath(name)
            if is_photo(path):
                yield name
            elif not is_litter(path):
                passed_over.add(path)

    def tables(self) -> Iterator[str]:
        """Yield the address of this Parquet file, or those of all below if this is a folder.

        Names that start with `_` or `.` are skipped, as readers of Parquet do.
        """
        if _filesystem(self.protocol).isfile(self.root):
            yield self.root if self.is_local else self.written
            return
        names = self._walk()
        if self.is_local:
            # Spark writes folders with this ending.
            found = (path for path in Path(self.root).rglob("*.parquet") if path.is_file())
            names = (path.relative_to(self.root).as_posix() for path in found)
        for name in sorted(name for name in names if name.endswith(".parquet")):
            if not any(part.startswith(("_", ".")) for part in name.split("/")):
                yield str(Path(self.root, name)) if self.is_local else self.address(name)

    def photo(self, name: str) -> bytes | Path:
        """Return a photo's path if it is local, else its bytes.

        Raises:
            InvalidImage: this object cannot be read; the reason is the message.
        """
        if self.is_local:
            return Path(self.root, name)
        try:
            content = _filesystem(self.protocol).cat_file(
                f"{self.root}/{name}", start=0, end=MAX_IMAGE_BYTES + 1
            )
        except OSError as error:
            code = _s3_code(error)
            if code == "InvalidRange":  # the object is empty
                return b""
            reason = _OBJECT_ERRORS.get(code)
            if reason is None and not code and isinstance(error, FileNotFoundError):
                reason = "no such file"
            if reason is None:
                raise
            raise InvalidImage(reason) from None
        if len(content) > MAX_IMAGE_BYTES:
            raise InvalidImage(f"too large: more than {MAX_IMAGE_BYTES:,} bytes")
        return content

    def address(self, name: str) -> str:
        """Return the address of a file, in the form that the user wrote."""
        return str(Path(self.written, name)) if self.is_local else f"{self.written}/{name}"

    def names(self) -> Iterator[str]:
        """Yield the names of the files and folders directly in this folder."""
        try:
            for path in _filesystem(self.protocol).ls(self.root, detail=False):
                yield path.rstrip("/").rpartition("/")[2]
        except FileNotFoundError as error:
            if _s3_code(error):  # the bucket is missing, not the folder
                raise

    def read(self, name: str) -> bytes:
        """Return a file's bytes. Raises FileNotFoundError if it does not exist."""
        return _filesystem(self.protocol).cat_file(f"{self.root}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically."""
        if not self.is_local:
            # Objects become visible when they are complete.
            _filesystem(self.protocol).pipe_file(f"{self.root}/{name}", content)
            return
        path = Path(self.root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unique for each attempt. Readers of Parquet skip the leading dot.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _walk(self) -> Iterator[str]:
        try:
            for folder, _, files in _filesystem(self.protocol).walk(self.root, on_error="raise"):
                below = folder.strip("/").removeprefix(self.root).lstrip("/")
                yield from (f"{below}/{name}" if below else name for name in sorted(files))
        except FileNotFoundError as error:
            if _s3_code(error):
                raise


def storage_of(written: str) -> Storage:
    """Return the folder at a path or an address such as s3://bucket/prefix (also s3a://).

    Raises:
        UserError: nothing is written, the scheme is unknown, or its package or bucket is missing.
    """
    if not written:  # `Path` takes it for the current folder
        raise UserError("INPUT or OUTPUT is empty: name a folder or an address.")
    scheme, separator, rest = written.partition("://")
    if not separator:
        return Storage(str(Path(written)), "file", str(Path(written).absolute()))
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise UserError(f"{scheme}:// is not supported. Use a path or one of {known}.")
    root = rest.strip("/")
    bucket = root.partition("/")[0]
    if not bucket or "@" in bucket:
        raise UserError(
            f"{written} is not an address in object storage: {scheme}://BUCKET/"
            "PREFIX is expected, without credentials. Those of S3 belong in AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY."
        )
    protocol, package = _SCHEMES[scheme]
    try:
        _filesystem(protocol)
    except ImportError:
        also = ", or `make install-scale`" if protocol == "s3" else ""
        raise UserError(
            f"The package that reads {scheme}:// is missing: `pip install {package}`{also}."
        ) from None
    return Storage(f"{scheme}://{root}", protocol, root)


def open_file(address: str) -> IO[bytes]:
    """Open a file, local or in object storage, for reading."""
    if "://" not in address:
        return Path(address).open("rb")
    storage = storage_of(address)
    return _filesystem(storage.protocol).open(storage.root, "rb")


@contextmanager
def storage_errors_as_user_errors() -> Iterator[None]:
    """Turn errors of a bucket or of the connection to it, and refused access, into a UserError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _REFUSED and error.filename:
            raise UserError(
                f"Cannot use {error.filename}: {error.strerror}. Name another folder, or change "
                "its permissions."
            ) from None
        # s3fs raises OSErrors whose cause is botocore's error, which names the problem.
        cause = error.__cause__ or error
        if not type(cause).__module__.startswith(_CLIENTS):
            raise
        raise UserError(
            f"The request to object storage failed: {str(cause).rstrip('.')}. For S3, set "
            "AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
        ) from None


def _refuse(error: OSError) -> None:
    raise error


def _s3_code(error: BaseException) -> str:
    """Return S3's code of an error, such as NoSuchKey, or an empty text."""
    response = getattr(error.__cause__ or error, "response", None)
    return response["Error"].get("Code", "") if isinstance(response, dict) else ""


@lru_cache
def _filesystem(protocol: str) -> Any:
    """Return this process's client, which its threads share."""
    import fsspec

    return fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False)
