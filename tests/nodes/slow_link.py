"""A proxy for tcp that delays what passes, stalls it as a lost packet does, and cuts connections.

This kernel may have no ``tc netem``. A packet that tcp loses is sent again after some 200 ms, and all that follows
waits for it: that is what `stall_s` does. A cut connection loses all that was in flight.
"""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from dpshm.net.cuts import CONNECT_TIMEOUT_MS, CUT_MS, PROBE_S, PROBES

CHUNK = 1 << 16
NOTICE_CUTS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_S),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_S),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, CUT_MS),
)
"""As the peers' own sockets (`dpshm.net.cuts`). Without them the far half of a connection stays for ever if the
cable was cut for longer: the other side's kernel has given it up, and nothing is sent to it."""


class SlowLink:
    """Listens at `host`, on a port that it chooses, for each address that it is given. Runs a thread.

    Args:
        host: where it listens.
        delay_s: how long each direction takes.
        lost: the probability that a chunk stalls for `stall_s`.
        stall_s: for how long.
        seed: of the random numbers.
    """

    def __init__(
        self, host: str, *, delay_s: float, lost: float = 0.0, stall_s: float = 0.2, seed: int = 0
    ) -> None:
        self._host, self._delay_s, self._lost, self._stall_s = host, delay_s, lost, stall_s
        self._random = random.Random(seed)
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="slow-link", daemon=True)
        self._thread.start()

    def to(self, address: str) -> str:
        """The address at which this link leads to another: ``tcp://HOST:PORT``."""
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        return f"tcp://{self._host}:{self._call(self._listen(host, int(port)))}"

    def cut(self) -> int:
        """Ends all connections, and loses what is in flight; returns how many there were."""
        return self._call(self._cut())

    def close(self) -> None:
        """Ends it."""
        self._call(self._cut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _call(self, work: Coroutine[Any, Any, int]) -> int:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self, host: str, port: int) -> int:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_MS / 1000):
                    far_reader, far_writer = await asyncio.open_connection(host, port)
            except OSError:
                writer.close()
                return
            for level, option, value in NOTICE_CUTS:
                far_writer.get_extra_info("socket").setsockopt(level, option, value)
            ends = {writer, far_writer}
            self._open |= ends
            await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))
            self._open -= ends

        server = await asyncio.start_server(serve, self._host, 0)
        return int(server.sockets[0].getsockname()[1])

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        in_flight: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sender = asyncio.create_task(self._deliver(in_flight, writer))
        due = 0.0
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                stall_s = self._stall_s if self._random.random() < self._lost else 0.0
                due = max(due, self._loop.time() + self._delay_s + stall_s)
                in_flight.put_nowait((due, data))
        in_flight.put_nowait((due, b""))
        with suppress(OSError):
            await sender

    async def _deliver(self, in_flight: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            due, data = await in_flight.get()
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            if not data or writer.is_closing():
                writer.close()
                return
            writer.write(data)
            await writer.drain()

    async def _cut(self) -> int:
        number = len(self._open) // 2
        for writer in self._open:
            writer.transport.abort()
        return number
