"""A TCP relay on loopback that delays data, to simulate a distant network.

    python -m benchmarks.relay PORT [--delay SECONDS]

Relays connections to PORT on this host, in both directions, and prints its own port. It ends when
its stdin does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 65536


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """Pass on everything from one side, each piece after the delay, and then its end."""
    loop = asyncio.get_running_loop()
    # Bounded, so that a sender is not faster than the receiver.
    due: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(1024)

    async def read() -> None:
        data = b"-"
        while data:
            data = await reader.read(CHUNK)
            await due.put((loop.time() + delay, data))

    async def deliver() -> None:
        while True:
            when, data = await due.get()
            await asyncio.sleep(max(0.0, when - loop.time()))
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()

    await asyncio.gather(read(), deliver())


async def serve(port: int, delay: float) -> None:
    """Relay until stdin ends."""

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        with contextlib.suppress(OSError):
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(there_writer)
            both = (carry(reader, there_writer, delay), carry(there_reader, writer, delay))
            await asyncio.gather(*both)
        for one in writers:
            one.close()

    server = await asyncio.start_server(meet, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


@contextlib.contextmanager
def relay(port: int, delay: float) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A relay in a process of its own: its port, and the process."""
    command = [sys.executable, "-m", "benchmarks.relay", str(port), "--delay", str(delay)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), process
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("port", type=int)
    parser.add_argument("--delay", type=float, default=0.025, help="seconds in each direction")
    args = parser.parse_args()
    asyncio.run(serve(args.port, args.delay))


if __name__ == "__main__":
    main()
