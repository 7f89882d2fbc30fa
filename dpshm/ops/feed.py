"""Publishes a group's loads at a fixed rate on a ZMQ PUB socket, for routers that are not front-ends.

A message has two frames: `TOPIC` with the group's name, and `dpshm.ops.loads.Loads` as JSON. A subscriber that is
slow loses messages and never holds the others up; each message is complete, so the next one says all.
"""

from __future__ import annotations

import threading
import time

import zmq

from dpshm.board.board import Board
from dpshm.errors import SettingError
from dpshm.net.addresses import allow_ipv6, cannot_listen, is_loopback, is_port
from dpshm.net.context import context
from dpshm.ops.loads import SCHEMA_VERSION, LoadReader

TOPIC = f"dpshm/loads/{SCHEMA_VERSION} ".encode()
QUEUE_MESSAGES = 16
"""Of a subscriber that does not keep up."""


class Feed:
    """The feed of one group.

    Args:
        board: the group's board, attached read-only; `close` closes it.
        address: where to publish: ``tcp://HOST:PORT`` or ``ipc://PATH``; a port of 0: any free one.
        insecure: allow tcp on other addresses than the loopback's. Every peer that reaches it can read the loads.

    Attributes:
        address: where subscribers connect.
        sent: how many messages were published.

    Raises:
        SettingError: nothing can be published there.
    """

    def __init__(self, board: Board, address: str, *, insecure: bool = False) -> None:
        kind, _, where = address.partition("://")
        if kind not in ("tcp", "ipc") or not where:
            raise SettingError(f"{address!r} is no address: give tcp://HOST:PORT or ipc://PATH")
        if kind == "tcp" and not is_port(where.rpartition(":")[2]):
            raise SettingError(f"{address!r} has no port from 0 to 65535: give tcp://HOST:PORT")
        if kind == "tcp" and not insecure and not is_loopback(where.rpartition(":")[0]):
            raise SettingError(
                f"{address} can be reached from outside, and the feed is not encrypted: tunnel it, or say "
                "--insecure if every peer that reaches that address may read the loads"
            )
        self._topic = TOPIC + board.segment.group.encode()
        self._reader = LoadReader(board)
        self._ended = threading.Event()
        self.sent = 0
        self._socket = context().socket(zmq.PUB)
        self._socket.linger = 0
        self._socket.sndhwm = QUEUE_MESSAGES
        try:
            allow_ipv6(self._socket, address)
            self._socket.bind(address)
        except zmq.ZMQError as e:
            self._socket.close()
            raise cannot_listen("cannot publish at", address, e, ". Choose another address") from None
        endpoint = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        self.address = endpoint.rstrip(b"\0").decode() if isinstance(endpoint, bytes) else address

    def run(self, rate_hz: float) -> None:
        """Publishes at that rate until `stop`."""
        interval_s, next_s = 1 / rate_hz, time.monotonic()
        while not self._ended.wait(max(0.0, next_s - time.monotonic())):
            next_s = max(next_s + interval_s, time.monotonic())
            self._socket.send_multipart([self._topic, self._reader.read_json()])
            self.sent += 1

    def stop(self) -> None:
        """Ends `run`, from another thread or a signal handler."""
        self._ended.set()

    def close(self) -> None:
        """Closes the socket and the board. Call it in the thread that ran `run`."""
        self._socket.close()
        self._reader.close()
