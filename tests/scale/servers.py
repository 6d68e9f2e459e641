"""Real servers for the tests, on 127.0.0.1, each in a process group that is stopped by its id."""

import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.conftest import free_port
from tests.pipeline.conftest import HOST, running

BUCKET = "bucket"


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection((HOST, port), timeout=5):
        return True
    return False


@contextmanager
def s3_server(keys: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Run an S3 server with one bucket; yield its address, and a client."""
    import boto3

    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
        log = Path(folder) / "log"
        with running(command, os.environ, log, lambda: listens(port)):
            address = f"http://{HOST}:{port}"
            client = boto3.client(
                "s3",
                endpoint_url=address,
                aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
                aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
                region_name="us-east-1",
            )
            client.create_bucket(Bucket=BUCKET)
            yield address, client


def stored(client: Any) -> dict[str, bytes]:
    """Return every object of the bucket by its key."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    return {
        item["Key"]: client.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read()
        for page in pages
        for item in page.get("Contents", [])
    }
