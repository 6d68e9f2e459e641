"""Places of many files: a folder, or a prefix of S3-compatible object storage.

The endpoint and the credentials of S3 are those of its standard environment (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_PROFILE, ...), wherever this runs; none is kept.
"""

import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from facegender.data.image_files import is_photo, walk_images
from facegender.data.images import InvalidImage
from facegender.errors import UserError

# No image is larger, and one of them is held in memory.
MAX_IMAGE_BYTES = 500_000_000
# What S3 answers of one object; whatever else it answers concerns them all.
_OF_ONE_OBJECT = {
    "NoSuchKey": "no such file",
    "404": "no such file",
    "AccessDenied": "cannot be read: AccessDenied",
    "InvalidObjectState": "cannot be read: it is archived",
}
# Of a body that breaks off, which boto3 leaves to its callers.
_ATTEMPTS = 3


class Place(Protocol):
    """Where files are, by their names relative to it. It can be sent to other processes."""

    @property
    def written(self) -> str:
        """The place, as the user wrote it."""

    def photos(self) -> Iterator[str]:
        """Yield the names of all photos below, as `files.is_photo` knows them."""

    def photo(self, name: str) -> bytes | Path:
        """Return a photo's bytes, or its path. Raises InvalidImage if it is not to be had."""

    def address(self, name: str) -> str:
        """Return the full name of a file, as the place was written."""

    def names(self) -> Iterator[str]:
        """Yield the names of the files and folders that are directly in the place."""

    def read(self, name: str) -> bytes:
        """Return a file's bytes. Raises FileNotFoundError if there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file, which is never seen half-written."""


def place_of(written: str) -> Place:
    """Return the place that a user wrote: a path, or s3://bucket/prefix (also s3a://).

    Raises:
        UserError: boto3 is missing, or there is no bucket in the address.
    """
    if not is_s3(written):
        return Folder(str(Path(written)), str(Path(written).absolute()))
    try:
        import boto3  # noqa: F401
    except ImportError:
        raise UserError(
            "boto3 is missing, which S3 needs: `pip install 'facegender[s3]'`, or `make "
            "install-scale`."
        ) from None
    bucket, _, prefix = written.partition("://")[2].partition("/")
    if not bucket or "@" in bucket:
        raise UserError(
            f"{written} is no address on S3: s3://BUCKET/PREFIX is expected, without credentials, "
            "which belong in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    return Prefix(written.rstrip("/"), bucket, f"{prefix.strip('/')}/" if prefix.strip("/") else "")


def is_s3(written: str) -> bool:
    """Return whether an address is one on S3, by its scheme."""
    return written.startswith(("s3://", "s3a://", "s3n://"))


@contextmanager
def explained() -> Iterator[None]:
    """Turn what boto3 raises of a whole bucket, or of the way to it, into a UserError."""
    try:
        yield
    except Exception as error:
        # By name, for boto3 is not there for those who do not use S3.
        if not type(error).__module__.startswith("botocore"):
            raise
        raise UserError(
            f"S3 does not do it: {str(error).rstrip('.')}. AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY, or a profile, say where it is and who asks."
        ) from None


@dataclass(frozen=True)
class Folder:
    """A folder, which all machines that are to use it must see at the same path."""

    written: str
    path: str

    def photos(self) -> Iterator[str]:
        """Walk the folder."""
        return map(str, walk_images(Path(self.path)))

    def photo(self, name: str) -> bytes | Path:
        """Return its path, whether or not it is there."""
        return Path(self.path, name)

    def address(self, name: str) -> str:
        """Join the two."""
        return str(Path(self.written, name))

    def names(self) -> Iterator[str]:
        """List the folder, one level deep."""
        folder = Path(self.path)
        return (path.name for path in folder.iterdir()) if folder.is_dir() else iter(())

    def read(self, name: str) -> bytes:
        """Read the file."""
        return Path(self.path, name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Write beside it, and rename."""
        path = Path(self.path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name that no other attempt has, which readers of Parquet pass over.
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            aside.write_bytes(content)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


@dataclass(frozen=True)
class Prefix:
    """The objects of a bucket below a prefix, which is empty or ends in a slash."""

    written: str
    bucket: str
    prefix: str

    def photos(self) -> Iterator[str]:
        """Walk the prefix."""
        for page in self._pages():
            for entry in page.get("Contents", []):
                name = entry["Key"].removeprefix(self.prefix)
                if is_photo(PurePosixPath(name)):
                    yield name

    def photo(self, name: str) -> bytes:
        """Return its bytes."""
        from botocore.exceptions import ClientError

        try:
            return self._get(name, MAX_IMAGE_BYTES)
        except ClientError as error:
            reason = _OF_ONE_OBJECT.get(error.response["Error"]["Code"])
            if reason is None:
                raise
            raise InvalidImage(reason) from None

    def address(self, name: str) -> str:
        """Join the two."""
        return f"{self.written}/{name}"

    def names(self) -> Iterator[str]:
        """List the prefix, one level deep."""
        for page in self._pages(Delimiter="/"):
            for entry in page.get("Contents", []):
                yield entry["Key"].removeprefix(self.prefix)
            for entry in page.get("CommonPrefixes", []):
                yield entry["Prefix"].removeprefix(self.prefix).rstrip("/")

    def read(self, name: str) -> bytes:
        """Read the object."""
        from botocore.exceptions import ClientError

        try:
            return self._get(name)
        except ClientError as error:
            if error.response["Error"]["Code"] in {"NoSuchKey", "404"}:
                raise FileNotFoundError(self.address(name)) from None
            raise

    def write(self, name: str, content: bytes) -> None:
        """Put the object, which S3 does whole or not at all."""
        _client().put_object(Bucket=self.bucket, Key=self.prefix + name, Body=content)

    def _pages(self, **options: str) -> Iterable[dict]:
        # A thousand names a page: no list of all of them is held.
        return (
            _client()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=self.bucket, Prefix=self.prefix, **options)
        )

    def _get(self, name: str, limit: int | None = None) -> bytes:
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        attempts = _ATTEMPTS
        while True:
            answer = _client().get_object(Bucket=self.bucket, Key=self.prefix + name)
            if limit is not None and answer["ContentLength"] > limit:
                answer["Body"].close()
                raise InvalidImage(f"too large: {answer['ContentLength']:,} bytes")
            try:
                return answer["Body"].read()
            except (HTTPClientError, IncompleteReadError):
                attempts -= 1
                if not attempts:
                    raise


@lru_cache(maxsize=1)
def _client() -> Any:
    """Return this process's client of S3, which its threads may share."""
    import boto3

    return boto3.client("s3")
