"""Files over HTTP, from servers that are not trusted and never waited for long."""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import signal
import socket
import urllib.error
import urllib.request
from errno import EINPROGRESS
from urllib.parse import urlsplit

from .linux import end_with_parent
from .state import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

CONNECT = 5.0  # seconds to connect
_SILENCE = 15.0  # seconds that a server may be silent
_SCHEMES = ("http", "https")


class Unreachable(Failure):
    """The network gave no answer, or the connection was lost; another try may succeed."""


class Missing(Failure):
    """The server answers, but does not have the file."""


class Short(Failure):
    """The server's file ends before the requested start."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def redirect_request(  # type: ignore[no-untyped-def]
        self, request, answer, code, text, headers, target
    ):
        before, after = urlsplit(request.full_url).scheme, urlsplit(target).scheme
        if after not in _SCHEMES or (before == "https" and after != "https"):
            raise Failure(f"{shown(request.full_url)}: redirected to {shown(target)}, not followed")
        return super().redirect_request(request, answer, code, text, headers, target)


def _opener() -> urllib.request.OpenerDirector:
    """An opener without Python's defaults for files, FTP and ``data:``."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


class Answer:
    """An open answer: its bytes, their start in the file, and how much is left."""

    def __init__(self, response: http.client.HTTPResponse, start: int, url: str) -> None:
        self._response, self.start, self._url = response, start, url

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()

    def read(self, count: int) -> bytes:
        """At most `count` bytes; none at the end, even if that is premature."""
        try:
            return self._response.read(count)
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{shown(self._url)}: {_reason(error)}") from None

    @property
    def left(self) -> int | None:
        """How many bytes are left, if the header contained a length."""
        return self._response.length


def get(url: str, start: int = 0) -> Answer:
    """Request a file from `start` on; the server may start at 0 anyway."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "orbctl-simulator"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 the opener decides
        response = _opener().open(request, timeout=_SILENCE)
    except urllib.error.HTTPError as error:
        error.close()
        text = f"{shown(url)}: HTTP {error.code} {shown(error.reason)}"
        kinds = {404: Missing, 410: Missing, 416: Short}
        raise kinds.get(error.code, Unreachable if error.code >= 500 else Failure)(text) from None
    except ValueError as error:
        raise Failure(f"{shown(url)}: {shown(str(error))}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"{shown(url)}: {_reason(error)}") from None
    return Answer(response, _start_of(response, start, url), url)


def _start_of(response: http.client.HTTPResponse, wanted: int, url: str) -> int:
    if response.status != 206:
        return 0
    told = response.headers.get("Content-Range", "")
    if not told.startswith(f"bytes {wanted}-"):
        raise Failure(f"{shown(url)}: asked for bytes {wanted}-, got {told!r}")
    return wanted


def read(url: str, most: int, seconds: float = 60) -> bytes:
    """A whole small file."""
    parts, count = [], 0
    with _deadline(f"{shown(url)}: not read in {seconds:.0f} seconds", seconds), get(url) as answer:
        for part in iter(lambda: answer.read(1 << 16), b""):
            parts.append(part)
            count += len(part)
            if count > most:
                raise Failure(f"{shown(url)}: larger than {most >> 20} MB")
        if answer.left:
            raise Unreachable(f"{shown(url)}: the connection was lost")
    return b"".join(parts)


@contextlib.contextmanager
def _deadline(text: str, seconds: float) -> Iterator[None]:
    """Interrupt a server that takes too long, in whatever way."""

    def end(*_: object) -> None:
        raise Unreachable(text)

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def exists(url: str) -> bool:
    try:
        with get(url):
            return True
    except Missing:
        return False


def reach(url: str) -> None:
    """Fail unless a connection to its server, or to the proxy, can be made in seconds.

    A separate process tries, because a resolver that waits for an answer cannot be interrupted.
    """
    host, port = _peer(url)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            end_with_parent()
            os.close(reader)
            os.write(writer, (_connect(host, port) or "ok").encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        ready = select.select([reader], [], [], CONNECT)[0]
        told = os.read(reader, 1000).decode() if ready else f"no answer in {CONNECT:.0f} seconds"
    finally:
        os.close(reader)
        os.kill(child, 9)
        os.waitpid(child, 0)
    if told != "ok":
        raise Unreachable(f"{host}: {told or 'cannot be reached'}")


def _peer(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        proxy = urllib.request.getproxies().get(parts.scheme)
        if proxy and parts.hostname and not urllib.request.proxy_bypass(parts.netloc):
            url = proxy if "//" in proxy else f"//{proxy}"
            parts = urlsplit(url)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        host, port = None, 0
    if not host or not port:
        raise Failure(f"{shown(url)}: not a URL of a server")
    return host, port


def _connect(host: str, port: int) -> str:
    """Try all addresses at once. Returns the reason why none answered."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return _reason(error)
    reason, waiting = "no address", []
    for family, kind, protocol, _, address in found:
        try:
            one = socket.socket(family, kind, protocol)
            one.setblocking(False)
            number = one.connect_ex(address)
        except OSError as error:
            reason = _reason(error)
            continue
        if number in (0, EINPROGRESS):
            waiting.append(one)
        else:
            reason = os.strerror(number).lower()
    while waiting:
        for one in select.select([], waiting, [])[1]:
            number = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not number:
                return ""
            reason = os.strerror(number).lower()
            waiting.remove(one)
    return reason


def _reason(error: Exception) -> str:
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, (socket.timeout, TimeoutError)):
        return f"silent for {_SILENCE:.0f} seconds"
    if isinstance(inner, http.client.IncompleteRead):
        return "the connection was lost"
    text = getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
    return shown(str(text)).lower()


def shown(url: str) -> str:
    """A URL, or a server's text, for a message: without a password, and on one line."""
    before, slashes, after = url.partition("//")
    if slashes and "@" in after:
        url = f"{before}//{after.rpartition('@')[2]}"
    line = " ".join(url.split())
    return "".join(letter if letter.isprintable() else "?" for letter in line)[:200]
