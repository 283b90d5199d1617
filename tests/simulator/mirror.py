"""A mirror of images on loopback: a simplestreams index, and ways in which servers misbehave."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

INDEX = "streams/v1/index.json"
IMAGES = "streams/v1/images.json"


def archive(root: Path, target: Path, **env: str) -> Path:
    command = ["tar", "--xattrs", "--numeric-owner", "-C", root, "-cJf", target, "."]
    subprocess.run(command, check=True, env={**os.environ, **env})
    return target


class Mirror:
    """The files of a mirror in a directory. Tests may write anything to its tables."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.products: dict[str, Any] = {}
        self.write(INDEX, b"{}")
        self.save()

    def write(self, path: str, content: bytes) -> None:
        (self.place / path).parent.mkdir(parents=True, exist_ok=True)
        (self.place / path).write_bytes(content)

    def save(self) -> None:
        entry = {"datatype": "image-downloads", "path": IMAGES, "format": "products:1.0"}
        index = {"format": "index:1.0", "index": {"images": entry}}
        self.write(INDEX, json.dumps(index).encode())
        products = {"format": "products:1.0", "products": self.products}
        self.write(IMAGES, json.dumps(products).encode())

    def offer(self, name: str, content: bytes, serial: str = "20260101_05:24", **told: Any) -> str:
        """Offer an archive under a product's name. Returns its path. `told` can be wrong."""
        path = f"images/{name.replace(':', '/')}/{serial}/rootfs.tar.xz"
        self.write(path, content)
        item = {
            "ftype": "root.tar.xz",
            "path": path,
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            **told,
        }
        other = {"ftype": "lxd.tar.xz", "path": "images/meta", "size": 1, "sha256": "00" * 32}
        product = self.products.setdefault(name, {"versions": {}})
        product["versions"][serial] = {"items": {"lxd.tar.xz": other, "root.tar.xz": item}}
        self.save()
        return path


class Server(ThreadingHTTPServer):
    """Serves a mirror. `behave` may answer a request itself, and returns whether it did."""

    daemon_threads = True

    def __init__(self, mirror: Mirror, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.mirror = mirror
        self.asked: list[tuple[str, str]] = []
        self.behave: Callable[[_Handler], bool] = lambda handler: False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked_for(self, path: str) -> list[str]:
        """The ranges of the requests for a file."""
        return [told for name, told in self.asked if name == f"/{path}"]

    def handle_error(self, *_: Any) -> None:
        """Ignore clients that were killed."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range", "")))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if not self.server.behave(self):
                self.serve()

    def serve(self, cut: int = -1, ranges: bool = True) -> None:
        """Send the requested file, or its first bytes and then the end of the connection."""
        path = self.server.mirror.place / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content, start = path.read_bytes(), 0
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if ranges else None
        if match:
            start = int(match[1])
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + cut if cut >= 0 else None])
        self.wfile.flush()
        self.close_connection = cut >= 0

    def answer(self, content: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


Handler = _Handler


@contextlib.contextmanager
def serving(mirror: Mirror, port: int = 0) -> Iterator[Server]:
    with Server(mirror, port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
