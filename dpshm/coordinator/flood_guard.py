"""Notices peers that pile up what libzmq keeps without a limit: see `dpshm.coordinator.sockets`.

Three signs, of which each alone is enough: messages in a row without a pause, bytes of topics, and the growth of
this process. The answer to all of them is to end every connection, after which honest peers come back.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from contextlib import suppress

from dpshm.net import wire

_PAGE = os.sysconf("SC_PAGE_SIZE")
MAX_IN_A_ROW = 1 << 15
"""Messages from front-ends, or joins of engines, without the socket once being empty: libzmq queues them without a
limit, and all others wait behind them. Honest peers send a few a wave; thousands at worst, in a burst while none
has heard yet that the ranks were woken."""
MAX_GROWTH_BYTES = 256 << 20
"""Growth of a process that is a coordinator alone; a group of 4096 engines needs a tenth of it."""


class FloodGuard:
    """Notes what peers send, and says when it is a flood. Used in the wave thread alone.

    Args:
        own_process: this process is a coordinator alone, so its growth is the peers' doing.

    Attributes:
        flood: what the peers did, in words; empty while all is well.
    """

    def __init__(self, *, own_process: bool) -> None:
        self.flood = ""
        self._topic_bytes = 0
        self._in_a_row: dict[object, int] = {}
        self._growth = MemoryGuard(MAX_GROWTH_BYTES) if own_process else None

    def on_subscription(self, message: bytes) -> None:
        """A peer subscribed. Honest peers subscribe to everything, whose topic is empty."""
        self._topic_bytes += len(message) - 1
        if self._topic_bytes > wire.MAX_TOPIC_BYTES:
            self.flood = f"peers subscribed to topics of {self._topic_bytes} bytes, where there are none"

    def on_messages(self, source: object, count: int, *, more: bool) -> None:
        """So many messages were read from a socket, and there may be more, or it is empty."""
        self._in_a_row[source] = self._in_a_row.get(source, 0) + count if more else 0
        if self._in_a_row[source] > MAX_IN_A_ROW:
            self.flood = f"peers sent {self._in_a_row[source]} messages in a row without a pause"

    def check_growth(self) -> None:
        """Looks at this process's memory."""
        if self._growth is not None and self._growth.is_too_much():
            self.flood = f"peers made this process grow by {self._growth.bytes() >> 20} MiB"

    def on_disconnect(self) -> None:
        """Every connection was ended: counts anew, and gives freed memory back to the system."""
        self.flood = ""
        self._topic_bytes = 0
        self._in_a_row.clear()
        if self._growth is not None:
            self._growth.settle()


class MemoryGuard:
    """Compares the resident memory with what it was when this was made, or last settled.

    Args:
        limit_bytes: growth by more than this is too much.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        self._base = self._resident()

    def bytes(self) -> int:
        """Growth in bytes."""
        return self._resident() - self._base

    def is_too_much(self) -> bool:
        """Whether the growth exceeds the limit."""
        return self.bytes() > self._limit

    def settle(self) -> None:
        """Gives freed memory back to the system, and measures growth from what is left."""
        with suppress(AttributeError, OSError):  # glibc alone has malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
        self._base = self._resident()

    def _resident(self) -> int:
        return int(os.pread(self._fd, 128, 0).split()[1]) * _PAGE
