"""As much of an S3 server as runs need, which can be told to fail.

Objects are files, so that what a run made behind `s3://` is looked at as what one made here.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

BUCKET = "bucket"
_SLOW_SECONDS = 4.0  # pyarrow gives a request up, and tries again, after 3


@dataclass(frozen=True, kw_only=True)
class Failing:
    """How a server fails.

    Attributes:
        how: "slow" answers late, "503" refuses, "dies" breaks off in the middle of an upload and
            then answers nobody; "" does none of it.
        at: the request that it begins at, counted from 1; "dies" waits for an upload from there on.
        seconds: after which a refusing server is well again; None waits for `mend`.
        num_slow: answers that are late.
        lists_after: seconds that a listing is behind.
    """

    how: str = ""
    at: int = 1
    seconds: float | None = None
    num_slow: int = 3
    lists_after: float = 0.0


class FakeS3:
    """A bucket whose objects are files of `folder`."""

    def __init__(self, folder: Path, failing: Failing) -> None:
        self.folder, self._failing = folder, failing
        folder.mkdir(parents=True)
        self.num_requests = 0
        self.on_request: Callable[[int], None] = lambda number: None
        self.is_hit = False
        self._is_mended = failing.how == ""
        self._since: float | None = None
        self._num_slow = 0
        # By key, when it was written or deleted, and its size then.
        self._history: dict[str, list[tuple[float, int | None]]] = {}
        self._parts: dict[str, dict[int, bytes]] = {}
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake._answer(self)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    @classmethod
    @contextmanager
    def started(cls, folder: Path, failing: Failing) -> Iterator["FakeS3"]:
        fake = cls(folder, failing)
        thread = threading.Thread(target=fake._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield fake
        finally:
            fake._server.shutdown()
            fake._server.server_close()
            thread.join()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to take this server for s3://."""
        return {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def mend(self) -> None:
        self._is_mended = True

    def _is_failing(self, request: BaseHTTPRequestHandler) -> bool:
        """Whether this request fails; it is counted."""
        with self._lock:
            self.num_requests += 1
            self.on_request(self.num_requests)
            if self._is_mended or self.num_requests < self._failing.at:
                return False
            if self._failing.how == "dies" and self._since is None and request.command != "PUT":
                return False
            self.is_hit = True
            now = time.monotonic()
            self._since = now if self._since is None else self._since
            if self._failing.seconds is not None and now > self._since + self._failing.seconds:
                self._is_mended = True
                return False
            if self._failing.how == "slow":
                self._num_slow += 1
                self._is_mended = self._num_slow >= self._failing.num_slow
            return True

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        if self._is_failing(request):
            if self._failing.how == "dies":
                request.rfile.read(_length_of(request) // 2)
                request.close_connection = True
                return
            if self._failing.how == "503":
                _body_of(request)
                _reply(request, 503, b"<Error><Code>SlowDown</Code></Error>")
                return
            time.sleep(_SLOW_SECONDS)
        body = _body_of(request)
        path, _, query = request.path.partition("?")
        key = unquote(path).removeprefix(f"/{BUCKET}").removeprefix("/")
        fields = {k: v[0] for k, v in parse_qs(query, keep_blank_values=True).items()}
        with self._lock:
            status, data, headers = self._result_of(request, key, fields, body)
        try:
            _reply(request, status, data, headers)
        except ConnectionError:  # it was given up meanwhile
            request.close_connection = True

    def _result_of(
        self, request: BaseHTTPRequestHandler, key: str, fields: dict[str, str], body: bytes
    ) -> tuple[int, bytes, dict[str, str]]:
        match request.command:
            case "GET" | "HEAD" if not key:
                return 200, self._listing(fields) if request.command == "GET" else b"", {}
            case "GET" | "HEAD":
                return self._read(request, key)
            case "PUT" if "uploadId" in fields:
                self._parts[fields["uploadId"]][int(fields["partNumber"])] = body
            case "PUT" if key:
                self._write(key, body)
            case "POST" if "uploads" in fields:
                upload = f"upload-{len(self._parts)}"
                self._parts[upload] = {}
                return 200, _xml("InitiateMultipartUploadResult", UploadId=upload), {}
            case "POST" if "uploadId" in fields:
                parts = self._parts[fields["uploadId"]]
                self._write(key, b"".join(parts[number] for number in sorted(parts)))
                return 200, _xml("CompleteMultipartUploadResult", ETag="etag"), {}
            case "DELETE":
                if "uploadId" not in fields:
                    if not key.endswith("/"):
                        (self.folder / key).unlink(missing_ok=True)
                    self._note(key, None)
                return 204, b"", {}
        return 200, b"", {"ETag": '"etag"'}

    def _write(self, key: str, data: bytes) -> None:
        path = self.folder / key
        if not key.endswith("/"):  # pyarrow's mark of a folder
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self._note(key, len(data))

    def _note(self, key: str, size: int | None) -> None:
        self._history.setdefault(key, []).append((time.monotonic(), size))

    def _read(self, request: BaseHTTPRequestHandler, key: str) -> tuple[int, bytes, dict[str, str]]:
        path = self.folder / key
        if key.endswith("/") or not path.is_file():
            return 404, b"<Error><Code>NoSuchKey</Code></Error>", {}
        data = path.read_bytes()
        when = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(path.stat().st_mtime))
        headers = {"ETag": '"etag"', "Last-Modified": when, "Accept-Ranges": "bytes"}
        if asked := request.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data)) if last else len(data)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            return 206, data[start:stop], headers
        return 200, data, headers

    def _listing(self, fields: dict[str, str]) -> bytes:
        prefix, delimiter = fields.get("prefix", ""), fields.get("delimiter", "")
        before = time.monotonic() - self._failing.lists_after
        entries, folders = [], set()
        for key, events in sorted(self._history.items()):
            seen = [size for when, size in events if when <= before]
            if not key.startswith(prefix) or not seen or seen[-1] is None:
                continue
            head, found, _ = key.removeprefix(prefix).partition(delimiter or "\0")
            if found:
                folders.add(f"{prefix}{head}{delimiter}")
            else:
                entries.append(
                    f"<Contents><Key>{escape(key)}</Key><Size>{seen[-1]}</Size>"
                    "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                )
        entries += [
            f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            for folder in sorted(folders)
        ]
        head = f"<IsTruncated>false</IsTruncated><KeyCount>{len(entries)}</KeyCount>"
        return f"<ListBucketResult>{head}{''.join(entries)}</ListBucketResult>".encode()


def _length_of(request: BaseHTTPRequestHandler) -> int:
    named = ("x-amz-decoded-content-length", "Content-Length")
    return next((int(request.headers[name]) for name in named if request.headers.get(name)), 0)


def _body_of(request: BaseHTTPRequestHandler) -> bytes:
    """What was sent, out of the pieces that HTTP and S3 each cut it into."""
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(_length_of(request))
    sent = b""
    while size := int(request.rfile.readline(), 16):
        sent += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    if request.headers.get("Content-Encoding") != "aws-chunked":
        return sent
    body, at = b"", 0
    while True:
        line, _, _ = sent[at:].partition(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        if size == 0:
            return body
        at += len(line) + 2
        body += sent[at : at + size]
        at += size + 2


def _xml(name: str, **fields: str) -> bytes:
    inner = "".join(f"<{key}>{escape(value)}</{key}>" for key, value in fields.items())
    return f"<{name}>{inner}</{name}>".encode()


def _reply(
    request: BaseHTTPRequestHandler,
    status: int,
    data: bytes,
    headers: dict[str, str] | None = None,
) -> None:
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    if status != 204:
        request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)
