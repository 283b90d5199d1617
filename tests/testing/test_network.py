"""Requests of a test over the network, to servers on this host."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pyinfra_orbstack.testing import network

from .. import loopback

REDIRECT = b"HTTP/1.1 301 Moved\r\nLocation: /there\r\nContent-Length: 0\r\n\r\n"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/moved":
            self.wfile.write(REDIRECT)
            return
        body = f"{self.path} of {self.headers['Host']}: é".encode("latin-1")
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Type", "text/plain; charset=latin-1")
        self.send_header("X-Kind", "Test")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def free_port() -> int:
    return loopback.free_port()


@pytest.fixture
def port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def get(port: int, path: str = "/", seconds: float = 20) -> network.Response:
    return network.get("127.0.0.1", port, path, {"Host": "shop"}, seconds)


def test_http_returns_the_response(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    found = get(port, "/a?b=c")
    assert (found.status, found.text) == (200, "/a?b=c of shop: é")
    assert found.headers["x-kind"] == "Test"
    assert get(port, "b").text.startswith("/b of")
    assert get(port, "/missing").status == 404
    moved = get(port, "/moved")
    assert (moved.status, moved.headers["location"]) == (301, "/there")


def test_a_slow_server_is_waited_for(free_port: int) -> None:
    """First the port is closed, then a server closes the connection, then one answers."""

    def serve() -> None:
        time.sleep(0.5)
        with socket.create_server(("127.0.0.1", free_port)) as rude:
            rude.accept()[0].close()
        with HTTPServer(("127.0.0.1", free_port), Handler) as server:
            server.handle_request()

    thread = threading.Thread(target=serve)
    thread.start()
    assert get(free_port).status == 200
    thread.join()


def test_no_answer_in_time(free_port: int) -> None:
    with pytest.raises(AssertionError, match=r"127\.0\.0\.1:\d+/x did not .* 0.5 s: .*refused"):
        get(free_port, "/x", seconds=0.5)


def test_a_silent_server_is_not_waited_for_longer() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        pytest.raises(AssertionError, match=r"within 0\.5 s: .*timed out"),
    ):
        get(mute.getsockname()[1], seconds=0.5)
