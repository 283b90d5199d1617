"""The relay that stands for a network."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time

from benchmarks.relay import relay


def test_everything_passes_in_both_directions_and_late() -> None:
    data = os.urandom(3_000_000)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        relay(server.getsockname()[1], 0.1) as (
            port,
            process,
        ),
    ):

        def answer() -> None:
            with server.accept()[0] as there, there.makefile("rb") as reading:
                there.sendall(hashlib.sha256(reading.read()).digest())

        answering = threading.Thread(target=answer)
        answering.start()
        with socket.create_connection(("127.0.0.1", port)) as here:
            here.sendall(data)
            ended = time.monotonic()
            here.shutdown(socket.SHUT_WR)
            with here.makefile("rb") as reading:
                assert reading.read() == hashlib.sha256(data).digest()
        assert time.monotonic() - ended > 0.2
        answering.join()
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0
