"""An S3 server on loopback, and a proxy in front of it that breaks requests as real storage does."""

import http.client
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

BUCKET = "corpus"
FOR_EVER = 1 << 30
ERRORS = {
    "500": (500, "InternalError"),
    "503": (503, "ServiceUnavailable"),
    "SlowDown": (503, "SlowDown"),
    "RequestTimeTooSkewed": (403, "RequestTimeTooSkewed"),
    "RequestTimeout": (400, "RequestTimeout"),
    "AccessDenied": (403, "AccessDenied"),
}
"""Answers of a store, by the code in their body."""
HOP_HEADERS = ("connection", "transfer-encoding", "expect", "keep-alive")


@dataclass
class Faults:
    """What to do to which requests; the numbers count down."""

    kind: str = ""
    """A code of ERRORS, or: silence, reset, short, flip, lost_reply, unconditional."""
    times: int = 0
    method: str = "GET"
    matches: Callable[[str], bool] = lambda target: True
    seen: list[tuple[str, str]] = field(default_factory=list)
    """(method, target) of every request, in order."""
    injected: int = 0
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def inject(
        self, kind: str, times: int, *, method: str = "GET", matches: Callable[[str], bool] = lambda target: True
    ) -> None:
        """From now on do `kind` to the next `times` requests of a method whose target matches."""
        with self.lock:
            self.kind, self.times, self.method, self.matches = kind, times, method, matches
            self.injected = 0
            self.seen.clear()

    def take(self, method: str, target: str) -> str | None:
        """The fault for a request, or None."""
        with self.lock:
            self.seen.append((method, target))
            if self.times <= 0 or method != self.method or not self.matches(target):
                return None
            self.times -= 1
            self.injected += 1
            return self.kind


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Faults
    upstream: tuple[str, int]

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.faults.take(self.command, self.path)
        if kind in ERRORS:
            self._answer_error(*ERRORS[kind])
        elif kind == "silence":
            self.faults.done.wait(60)
            self._cut(reset=True)
        else:
            self._forward(body, kind)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer_error(self, status: int, code: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _forward(self, body: bytes, kind: str | None) -> None:
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_HEADERS}
        if kind == "unconditional":
            headers = {k: v for k, v in headers.items() if k.lower() != "if-none-match"}
        connection.request(self.command, self.path, body=body, headers=headers)
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        if kind == "lost_reply":
            self._cut(reset=True)
            return
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in (*HOP_HEADERS, "content-length", "date", "server"):
                self.send_header(name, value)
        length = reply.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind in ("reset", "short"):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self._cut(reset=kind == "reset")
        elif kind == "flip":
            middle = len(content) // 2
            self.wfile.write(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        else:
            self.wfile.write(content)

    def _cut(self, *, reset: bool) -> None:
        """End the connection: with a RST, or in order but early."""
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # The files over the socket keep it open otherwise, and close() alone would send no RST.
            self.rfile.close()
            self.wfile.close()
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


@contextmanager
def fault_proxy(upstream: tuple[str, int]) -> Iterator[tuple[str, Faults]]:
    """(URL, faults) of a proxy in front of an HTTP server."""
    faults = Faults()
    handler = type("Handler", (_Proxy,), {"faults": faults, "upstream": upstream})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda request, client_address: None  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        faults.done.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def s3_server() -> Iterator[tuple[str, int]]:
    """(host, port) of an S3 server in memory."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()
    finally:
        server.stop()


def environment(url: str) -> dict[str, str]:
    """Variables under which boto3 and pyarrow, here and in a child process, talk to the server at `url` alone."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@pytest.fixture(scope="module")
def s3_address() -> Iterator[tuple[str, int]]:
    """Address of one S3 server for the module."""
    with s3_server() as address:
        yield address


@pytest.fixture
def s3(s3_address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of an empty bucket on a healthy server; the process's environment leads there."""
    import boto3

    for name, value in environment(f"http://{s3_address[0]}:{s3_address[1]}").items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for found in page.get("Contents", []):
            client.delete_object(Bucket=BUCKET, Key=found["Key"])
    return f"s3://{BUCKET}"


@pytest.fixture
def broken_s3(s3: str, s3_address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Faults]]:
    """(URI of an empty bucket, faults to inject) with the proxy on the way to the server."""
    from pipelines.data import object_store, storage_faults

    monkeypatch.setattr(storage_faults, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(object_store, "READ_TIMEOUT_S", 0.5)
    with fault_proxy(s3_address) as (url, faults):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield s3, faults
