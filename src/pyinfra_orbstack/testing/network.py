"""Network requests from a test on this host to a machine."""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping
from typing import NamedTuple

#: Seconds between two attempts to reach a server that does not answer yet.
PAUSE = 0.2


class Response(NamedTuple):
    """A server's response.

    + status: HTTP status, such as 200
    + headers: headers by name, in lower case
    + text: the body

    **Example:**

    .. code:: python

        answer = machine.http("/")
        assert answer.headers["content-type"] == "text/html"
    """

    status: int
    headers: Mapping[str, str]
    text: str


def get(address: str, port: int, path: str, headers: Mapping[str, str], seconds: float) -> Response:
    """GET a path, retrying until a server answers; a redirect is an answer.

    It bypasses this host's proxies, which would not know the machine.

    Raises:
        AssertionError: No server answered in time.
    """
    deadline = time.monotonic() + seconds
    path = path if path.startswith("/") else f"/{path}"
    while True:
        left = max(deadline - time.monotonic(), PAUSE)
        connection = http.client.HTTPConnection(address, port, timeout=left)
        try:
            connection.request("GET", path, headers=dict(headers))
            answer = connection.getresponse()
            charset = answer.headers.get_content_charset("utf-8")
            text = answer.read().decode(charset, "replace")
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Response(answer.status, found, text)
        except (OSError, http.client.BadStatusLine, http.client.IncompleteRead) as silent:
            if time.monotonic() + PAUSE >= deadline:
                reason = f"{type(silent).__name__}: {silent}"
                raise AssertionError(
                    f"http://{address}:{port}{path} did not answer within {seconds:g} s: {reason}"
                ) from None
        finally:
            connection.close()
        time.sleep(PAUSE)
