"""Carries an engine's newest row to a coordinator on another node, without ever holding the engine up.

The newest message counts, so each may be lost, and one that was not sent yet is replaced. The first change goes
out at once, in the engine's thread. Changes that follow within `LEAST_INTERVAL_NS` go out together, a moment
later, in a thread of the carrier's own, which also repeats the last message every `REMOTE_INTERVAL_NS`: it says
that the process lives.

A peer that does not read costs nothing: the socket holds one message, and the kernel `KERNEL_BYTES`. A connection
on which nothing is heard is given up and made again, so that after a cut the newest row comes first.
"""

from __future__ import annotations

import logging
import threading
import time

import zmq

from dpshm.net.context import context
from dpshm.net.cuts import notice_cuts
from dpshm.net.keys import ClientKeys, connect
from dpshm.rules.liveness import REMOTE_INTERVAL_NS

logger = logging.getLogger(__name__)

LEAST_INTERVAL_NS = 1_000_000
"""The shortest time between two messages: a thousand in a second."""
KERNEL_BYTES = 16 << 10
"""What the kernel keeps for a peer that does not read: some 30 rows, which are old when they arrive."""
LAST_WORD_MS = 1000
"""For so long after `close` the last message may wait for its connection."""


class Carrier:
    """Sends one process's messages to one address. `carry` belongs to one thread.

    Args:
        address: of the coordinator's socket for engines' reports.
        keys: for it; None if it asks for none.
    """

    def __init__(self, address: str, keys: ClientKeys | None) -> None:
        self._address, self._keys = address, keys
        self._socket = s = context().socket(zmq.PUSH)
        s.linger = 0
        s.setsockopt(zmq.CONFLATE, 1)
        s.sndbuf = KERNEL_BYTES
        notice_cuts(s)
        connect(s, address, keys)
        # Reentrant: a signal handler may publish in the thread that is publishing.
        self._changed = threading.Condition()
        self._newest: bytes | None = None
        self._waits = self._ended = False
        self._sent_ns = 0
        self._thread = threading.Thread(target=self._run, name="dpshm-carrier", daemon=True)
        self._thread.start()

    def carry(self, message: bytes) -> None:
        """Sends a message, or the one after it, within `LEAST_INTERVAL_NS`. Never waits for a peer."""
        with self._changed:
            self._newest = message
            now_ns = time.monotonic_ns()
            if now_ns - self._sent_ns >= LEAST_INTERVAL_NS:
                self._send(now_ns)
            elif not self._waits:
                self._waits = True
                self._changed.notify()

    def close(self, last: bytes | None = None) -> None:
        """Sends a last message, and ends."""
        with self._changed:
            self._ended = True
            self._changed.notify()
            self._socket.close()
        self._thread.join()
        if last is not None:
            # Not through the other socket: what closes it takes the place of the one message that it holds.
            s = context().socket(zmq.PUSH)
            s.linger = LAST_WORD_MS
            try:
                connect(s, self._address, self._keys)
                s.send(last, zmq.NOBLOCK)
            finally:
                s.close()

    def _send(self, now_ns: int) -> None:
        # SYNC: two threads use the socket, each with the lock held: a full fence, as ZMQ asks for (x86 and Arm).
        self._sent_ns, self._waits = now_ns, False
        assert self._newest is not None
        try:
            self._socket.send(self._newest, zmq.NOBLOCK)
        except zmq.ZMQError as e:
            logger.debug("the row was not sent: %s; the next one replaces it", e)

    def _run(self) -> None:
        with self._changed:
            while not self._ended:
                now_ns = time.monotonic_ns()
                wait_ns = (LEAST_INTERVAL_NS if self._waits else REMOTE_INTERVAL_NS) - (now_ns - self._sent_ns)
                if wait_ns > 0 or self._newest is None:
                    self._changed.wait(max(wait_ns, LEAST_INTERVAL_NS) / 1e9)
                else:
                    self._send(now_ns)
