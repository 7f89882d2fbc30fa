"""Hostile peers, and honest ones that test whether the group still works.

`dial` speaks ZMTP over a plain socket (ZMTP 3.1, sections 3 and 4). It sends frames that no ZMQ library sends, as
fast as the kernel accepts them. `Honest` holds the honest peers of a group: two engines and a front-end, of this
process.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import zmq

from dpshm import Board, Engine, Frontend
from dpshm.board.words import DRAINED
from dpshm.net import wire
from dpshm.net.wire import encode_scale
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import Phase
from tests.support import TIMEOUT_S, polled, verdict, wait_until

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
TAKEN_S = 2.0
"""A send that waits for longer is one that the other side does not want."""


def frame(data: bytes, *, more: bool = False, command: bool = False) -> bytes:
    """One frame on the wire."""
    flags = (1 if more else 0) | (4 if command else 0)
    if len(data) < 256:
        return bytes((flags, len(data))) + data
    return bytes((flags | 2,)) + struct.pack(">Q", len(data)) + data


def dial(address: str, kind: bytes | None) -> socket.socket:
    """A connection to a bound ZMQ socket, past its handshake as a peer of that kind, or None: before it."""
    scheme, _, where = address.partition("://")
    if scheme == "ipc":
        s = socket.socket(socket.AF_UNIX)
        s.connect(where)
    else:
        host, _, port = where.rpartition(":")
        s = socket.create_connection((host, int(port)))
    s.settimeout(TIMEOUT_S)
    if kind is not None:
        s.sendall(GREETING)
        got = b""
        while len(got) < len(GREETING):
            if not (more := s.recv(len(GREETING) - len(got))):
                raise ConnectionResetError
            got += more
        s.sendall(frame(b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind, command=True))
        s.recv(4096)
    s.settimeout(TAKEN_S)
    return s


def resident_bytes(pid: int) -> int:
    """The memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


class Honest:
    """Two engines and a front-end of a group, used from the thread that made them."""

    def __init__(self, group: str) -> None:
        self.engines = [Engine.attach(group, dp_rank) for dp_rank in (0, 1)]
        self.frontend = Frontend.attach(group)
        self.board: Board = self.frontend.board
        self._operator: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.XSUB)
        self._operator.setsockopt(zmq.LINGER, 0)
        self._operator.connect(self.board.segment.header.stats_address)

    def restore(self) -> None:
        """Two ranks, none drained, all quiet: whatever honest words of hostile peers made of the group."""

        def restored() -> bool:
            if self.board.dp_size != 2:
                self._operator.send(encode_scale(2))
            for e, mark in enumerate(self.board.engine_mark[:2].tolist()):
                if mark & DRAINED:
                    self._operator.send(wire.encode_drain(e, False))
            if any([engine.poll(1) for engine in self.engines]):  # noqa: C419 - each has to look
                for engine in self.engines:
                    engine.wave_complete()
            for engine in self.engines:
                engine.publish(waiting=0, running=0)
            drained = any(mark & DRAINED for mark in self.board.engine_mark[:2].tolist())
            alive = all(verdict(self.board, e) is Verdict.ALIVE for e in (0, 1))
            return self.board.dp_size == 2 and not drained and alive and self.board.phase is Phase.PAUSED

        wait_until(restored)

    def go_round(self) -> None:
        """One wave: a request wakes both engines, both finish, and the coordinator knows all of it.

        The engine gets the request itself, as it would in a server: what else is sent may be lost in a flood.
        """
        self.restore()
        route = self.frontend.route(10)
        self.engines[route.dp_rank].receive(self.frontend.index, 10, route.wave)
        self.engines[route.dp_rank].publish(waiting=1, running=0)
        wait_until(lambda: polled(self.engines))
        wait_until(lambda: self.board.phase is Phase.RUNNING)
        route.done()
        for engine in self.engines:
            engine.publish(waiting=0, running=0)
            engine.wave_complete()
        wait_until(lambda: self.board.phase is Phase.PAUSED)

    def close(self) -> None:
        """All leave."""
        self._operator.close()
        self.frontend.close()
        for engine in self.engines:
            engine.close()


def send_while_taken(s: socket.socket, data: Sequence[bytes]) -> int:
    """Sends until the other side has had enough or hangs up; how many bytes it took."""
    taken = 0
    with suppress(OSError):  # a timeout is one
        for part in data:
            s.sendall(part)
            taken += len(part)
    return taken
