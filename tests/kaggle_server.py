"""A stand-in for Kaggle on this machine, which speaks the protocol of the client `kaggle` 2.2.

    with kaggle_server({"owner/faces": {1: zip_bytes}}, tokens={"secret"}) as server:
        subprocess.run(command, env={**env, **server.environment(), "KAGGLE_API_TOKEN": "secret"})

The client has no setting for another address. It goes to http://localhost when
KAGGLE_API_ENVIRONMENT is LOCALHOST, and like any user of `requests` it heeds `http_proxy`; so
the server plays the proxy for other processes, and no part of the client need be replaced. (TEST,
which kagglesdk maps to http://localhost:7777, does not reach it: `KaggleApi` knows LOCALHOST,
--staging and --admin only.) Inside this process, `server.use(monkeypatch)` changes the endpoint.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest

SIGNATURE = "canary-signature-of-the-storage-url"
_DATE = "Wed, 01 Jan 2025 00:00:00 GMT"


@dataclass(frozen=True)
class Fault:
    """Faults of one answer. Byte counts are of the bytes that this answer would send.

    Attributes:
        status: of the answer, instead of what is right.
        headers: more of them.
        cut: break the connection after so many bytes of the body.
        short: end the archive after so many bytes, and say that this is all of it.
        extra: announce so many bytes more than there are, then close the connection.
        stall: seconds of silence before the body.
        anonymous: leave out what the client needs to resume, and the length.
        body: send this instead.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    short: int | None = None
    extra: int = 0
    stall: float = 0
    anonymous: bool = False
    body: bytes | None = None


class Request(NamedTuple):
    """A request that arrived. `call` is a method of the API, or "storage"."""

    call: str
    authorization: str | None
    range: str | None
    body: dict[str, Any]


@dataclass
class KaggleServer:
    """The server's address, what it serves and expects, and what it was asked."""

    datasets: Mapping[str, Mapping[int, bytes]]
    tokens: set[str]
    keys: Mapping[str, str]
    refresh_tokens: Mapping[str, str]
    faults: dict[str, list[Fault]]
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """Variables that lead the client of another process here. They hold no credentials."""
        nowhere = {"no_proxy": "", "NO_PROXY": "", "all_proxy": "", "ALL_PROXY": ""}
        proxies = {"http_proxy": self.url, "HTTP_PROXY": self.url}
        return {"KAGGLE_API_ENVIRONMENT": "LOCALHOST", **proxies, **nowhere}

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lead the client of this process here."""
        from kagglesdk import kaggle_env

        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, self.url)

    def calls(self, call: str) -> list[Request]:
        return [request for request in self.requests if request.call == call]

    def accepts(self, authorization: str | None) -> bool:
        scheme, _, value = (authorization or "").partition(" ")
        if scheme == "Basic":
            user, _, key = base64.b64decode(value).decode().partition(":")
            return self.keys.get(user) == key
        return scheme == "Bearer" and value in self.tokens


@contextmanager
def kaggle_server(
    datasets: Mapping[str, Mapping[int, bytes]],
    *,
    tokens: set[str] | None = None,
    keys: Mapping[str, str] | None = None,
    refresh_tokens: Mapping[str, str] | None = None,
    faults: Mapping[str, list[Fault]] | None = None,
) -> Iterator[KaggleServer]:
    """Serve datasets while the context lasts.

    Args:
        datasets: for each slug the archives of its versions.
        tokens: access tokens that are valid.
        keys: the API key of each user.
        refresh_tokens: for each OAuth refresh token the access token that it is good for.
        faults: for a call of the API ("GetDataset", "DownloadDataset", "IntrospectToken",
            "GenerateAccessToken") or "storage", what goes wrong with its first answers in turn.
            For one slug only: "GetDataset owner/name".
    """
    state = KaggleServer(
        datasets,
        set(tokens or ()),
        dict(keys or {}),
        dict(refresh_tokens or {}),
        {call: list(some) for call, some in (faults or {}).items()},
    )

    class Handler(_Handler):
        server_state = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        state.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_state: KaggleServer

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        # As a proxy we are asked for the whole URL; in production there is no /api before /v1.
        service, _, call = urlsplit(self.path).path.rpartition("/")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self._note(call, body)
        authorization = self.headers["Authorization"]
        if fault.status is not None or fault.body is not None:
            # Echoes what it must not: a client that repeats our message gives the token away.
            self._send_json(fault.status or 200, f"failed for {authorization}", fault)
        elif call == "IntrospectToken":
            active = body.get("token") in self.server_state.tokens
            self._send_json(200, {"active": active, "username": "ada" if active else ""}, fault)
        elif call == "GenerateAccessToken":
            token = self.server_state.refresh_tokens.get(body.get("refreshToken", ""))
            if token is None:
                self._send_json(401, "no such token", fault)
            else:
                answer = {"token": token, "expiresIn": 3600, "userName": "ada"}
                self._send_json(200, answer, fault)
        elif not service.endswith("/datasets.DatasetApiService"):
            self._send_json(501, self.path, fault)
        elif not self.server_state.accepts(authorization):
            self._send_json(401, f"Unauthenticated: {authorization}", fault)
        else:
            self._answer(call, f"{body['ownerSlug']}/{body['datasetSlug']}", body, fault)

    def _answer(self, call: str, slug: str, body: dict[str, Any], fault: Fault) -> None:
        versions = self.server_state.datasets.get(slug, {})
        version = body.get("datasetVersionNumber") or max(versions, default=0)
        if version not in versions:
            self._send_json(404, "Not found", fault)
        elif call == "GetDataset":
            answer = {"id": 1, "ref": slug, "currentVersionNumber": version}
            self._send_json(200, answer, fault)
        elif call == "DownloadDataset":
            # Another host, as in real life, to which `requests` takes no credentials along.
            port = self.server_state.port
            host = "storage.invalid" if self.path.startswith("http:") else f"localhost:{port}"
            query = f"version={version}&X-Goog-Signature={SIGNATURE}"
            location = {"Location": f"http://{host}/storage/{slug}?{query}"}
            self._send(302, b"", fault, "text/html", location)
        else:
            self._send_json(501, call, fault)

    def do_GET(self) -> None:
        fault = self._note("storage", {})
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        slug = url.path.removeprefix("/storage/")
        content = self.server_state.datasets[slug][int(query["version"][0])]
        if query["X-Goog-Signature"] != [SIGNATURE]:
            fault = Fault(status=403)
        if fault.status is not None or fault.body is not None:
            self._send(fault.status or 200, fault.body or b"<Error/>", fault, "text/html")
            return
        content = content[: fault.short]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": etag, "Last-Modified": _DATE, "Accept-Ranges": "bytes"}
        asked = self.headers["Range"]
        if fault.anonymous:
            headers, asked = {}, None
        status, start = 200, 0
        if asked and self.headers["If-Range"] in {None, etag}:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(content) else 416
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(status, content[start:], fault, "application/zip", headers)

    def _note(self, call: str, body: dict[str, Any]) -> Fault:
        request = Request(call, self.headers["Authorization"], self.headers["Range"], body)
        self.server_state.requests.append(request)
        slug = f"{body.get('ownerSlug')}/{body.get('datasetSlug')}"
        for key in (f"{call} {slug}", call):
            if faults := self.server_state.faults.get(key):
                return faults.pop(0)
        return Fault()

    def _send_json(self, status: int, content: dict[str, Any] | str, fault: Fault) -> None:
        if isinstance(content, str):
            content = {"code": status, "message": content}
        body = json.dumps(content).encode() if fault.body is None else fault.body
        self._send(status, body, fault, "application/json")

    def _send(
        self,
        status: int,
        body: bytes,
        fault: Fault,
        kind: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in {**(headers or {}), **fault.headers}.items():
            self.send_header(name, value)
        if not fault.anonymous:
            self.send_header("Content-Length", str(len(body) + fault.extra))
        if not body:
            self._stall(fault)
        self.end_headers()  # which sends all of them
        if body:
            self._stall(fault)
        with suppress(OSError):  # the client may have given up
            self.wfile.write(body[: fault.cut])
        self.close_connection = True  # which is all that `cut` and `extra` need

    def _stall(self, fault: Fault) -> None:
        if fault.stall:
            self.server_state.stopped.wait(fault.stall)
