"""Who connects to a relay: peers that join, that are refused, and that pile up what libzmq keeps without a limit.

The guard against floods is that of the wave thread's sockets (`dpshm.coordinator.flood_guard`). Each look reads a
few messages, so that the relay keeps its interval however fast they come; and where relays join often, not all is
told each time (`dpshm.coordinator.relay.SAYS_ALL_NS`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import zmq

from dpshm.coordinator.flood_guard import FloodGuard
from dpshm.net import wire
from dpshm.net.relay_wire import topic_of

if TYPE_CHECKING:
    from dpshm.coordinator.relay_sockets import RelaySockets
    from dpshm.net.context import Socket

LOOK_NS = 10_000_000
BATCH = 64
"""So many messages of a socket are read in one look: 0.2 ms."""


class RelayPeers:
    """Reads what peers' subscriptions and connections say. Used under the relay's lock.

    Args:
        sockets: the relay's.
        nodes: how many there are.
        drop: counts and logs: a reason, one of `layout.DROP_REASONS`, and a detail.
        own_process: this process is a coordinator alone.
    """

    def __init__(
        self, sockets: RelaySockets, nodes: int, drop: Callable[[str, object], None], *, own_process: bool
    ) -> None:
        self._sockets, self._drop = sockets, drop
        self._topics = frozenset(map(topic_of, range(nodes)))
        # Nobody connects to the relays of other nodes: they connect to the head.
        self._guard = FloodGuard(own_process=own_process) if sockets.is_head else None
        self._next_ns = 0

    @property
    def flood(self) -> str:
        """What peers did, if every connection is to be ended for it; else empty."""
        return "" if self._guard is None else self._guard.flood

    def on_disconnect(self) -> None:
        """Every connection was ended."""
        if self._guard is not None:
            self._guard.on_disconnect()

    def look(self, now_ns: int, *, growth: bool) -> bool:
        """Reads a few messages, if it is time; whether another relay has joined.

        Args:
            now_ns: CLOCK_MONOTONIC.
            growth: looks at this process's memory, too.
        """
        if growth and self._guard is not None:
            self._guard.check_growth()
        if now_ns < self._next_ns or self.flood:
            return False
        joined, tells = False, self._sockets.tells
        more = self._guard is not None and self._look_at_connections(self._guard)
        number = 0
        while number < BATCH and _is_readable(tells):
            number += 1
            joined |= self._on_subscription(tells.recv())
        more |= number == BATCH
        if self._guard is not None:
            self._guard.on_messages(tells, number, more=number == BATCH)
        self._next_ns = 0 if more else now_ns + LOOK_NS
        return joined

    def _look_at_connections(self, guard: FloodGuard) -> bool:
        more, authenticator = False, self._sockets.authenticator
        for s, handle in authenticator.handlers.items():
            number = 0
            while number < BATCH and _is_readable(s):
                number += 1
                if (refused := handle(s.recv_multipart())) is not None:
                    self._drop("peer refused", refused)
            more |= number == BATCH
        if authenticator.exhausted:
            guard.flood = "peers opened connections until hardly a file descriptor was left"
        return more

    def _on_subscription(self, message: bytes) -> bool:
        if message[:1] == wire.SUBSCRIBE and message[1:] in self._topics:
            return True
        if message[:1] == wire.SUBSCRIBE and self._guard is not None:
            self._guard.on_subscription(message)
        elif message[:1] != wire.UNSUBSCRIBE:
            self._drop("malformed message", "relays only subscribe on this socket")
        return False


def _is_readable(s: Socket) -> bool:
    return bool(int(s.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
