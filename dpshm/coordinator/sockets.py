"""A coordinator's three sockets: made, bound, and bounded in what their peers can make them hold.

libzmq takes in what peers send before anybody has looked at it, so the limits are set here:

- a message longer than any honest one ends the connection that it came from;
- a pipe from a front-end or to an engine (XPUB) takes in one message at a time, since an XPUB empties its pipes,
  whenever anything looks at it, into a queue of its own: with longer pipes a fast peer fills it in no time;
- the rest has no limit in libzmq: that queue, where a peer may still be faster than the wave thread; how much a
  peer may subscribe to (a node for each byte of a topic); how many parts a message may have. Against them there is
  `Sockets.renew`: it closes everything and binds the same addresses. Whatever peers had piled up is gone, and
  honest ones come back by themselves; what was lost meanwhile the board tells.

The sockets are in a context of their own, because its end waits until all is closed, ipc paths too, and the
addresses can be bound again; and because the doorkeeper's address is one a context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import zmq

from dpshm.coordinator.authenticator import Authenticator
from dpshm.errors import SettingError
from dpshm.linux.descriptors import check_spare
from dpshm.net import wire
from dpshm.net.context import Socket
from dpshm.net.keys import ServerKeys

Addresses: TypeAlias = tuple[str, str, str]  # front-ends, to engines, from engines

UPSTREAM_HWM = 1
REPORTS_HWM = 100
"""Messages that a pipe holds before its sender has to wait."""
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 60, 10, 3
"""A machine that is gone without a word is noticed after a minute and a half."""


class Sockets:
    """The three bound sockets, and how each is bound. Used in the wave thread alone.

    Args:
        keys: what peers over tcp must have; None lets everybody in.
        refused: called with a sentence about each peer that was refused.

    Raises:
        OSError: no file descriptor is left.
    """

    def __init__(self, keys: ServerKeys | None, refused: Callable[[str], None]) -> None:
        self.keys = keys
        self._refused = refused
        self._bound: dict[Socket, str] = {}
        self._open()

    def _open(self) -> None:
        check_spare()
        self._context: zmq.Context[Socket] = zmq.Context()
        self.doorkeeper = Authenticator(self._context, self.keys, self._refused) if self.keys else None
        self.frontends = self._context.socket(zmq.XPUB)
        self.to_engines = self._context.socket(zmq.XPUB)
        self.from_engines = self._context.socket(zmq.PULL)
        for s in self.all:
            s.linger = 0
            s.tcp_keepalive = 1
            s.tcp_keepalive_idle = KEEPALIVE_IDLE_S
            s.tcp_keepalive_intvl = KEEPALIVE_INTERVAL_S
            s.tcp_keepalive_cnt = KEEPALIVE_COUNT
        self.from_engines.maxmsgsize = wire.MAX_MESSAGE_BYTES
        self.from_engines.rcvhwm = REPORTS_HWM
        for s in (self.frontends, self.to_engines):
            s.maxmsgsize = wire.MAX_UPSTREAM_BYTES
            s.rcvhwm = UPSTREAM_HWM
            s.setsockopt(zmq.XPUB_VERBOSER, 1)  # every join and leave is passed on, doubles too

    @property
    def all(self) -> tuple[Socket, Socket, Socket]:
        """All three."""
        return self.frontends, self.to_engines, self.from_engines

    def bind_ports(self, addresses: Addresses) -> Addresses:
        """Binds those that end in ``:*`` to a free port each; returns all, the ports filled in."""
        bound = [
            self._bind(s, address) if address.endswith(":*") else address
            for s, address in zip(self.all, addresses, strict=True)
        ]
        return bound[0], bound[1], bound[2]

    def bind(self, addresses: Addresses) -> None:
        """Binds those of the three that are not bound yet."""
        self._addresses = addresses
        for s, address in zip(self.all, addresses, strict=True):
            if s not in self._bound:
                self._bind(s, address)

    def unbind(self) -> None:
        """Takes back what was bound."""
        for s, address in self._bound.items():
            s.unbind(address)
        self._bound.clear()

    def renew(self) -> None:
        """Ends every connection and binds the same addresses anew, with other sockets.

        Raises:
            SettingError: an address was taken meanwhile; try again.
            OSError: no file descriptor is left; try again.
        """
        self._close()
        self._open()
        self.bind(self._addresses)

    def close(self) -> None:
        """Closes all three, for good."""
        self._close()
        del self._refused  # which refers back: the memory goes with the last handle

    def _bind(self, s: Socket, address: str) -> str:
        if self.doorkeeper is not None and address.startswith("tcp:"):
            self.doorkeeper.guard(s)
        try:
            s.bind(address)
        except zmq.ZMQError as e:
            raise SettingError(f"cannot bind {address}: {e.strerror}") from e
        self._bound[s] = s.getsockopt_string(zmq.LAST_ENDPOINT)
        return self._bound[s]

    def _close(self) -> None:
        if self.doorkeeper is not None:
            self.doorkeeper.close()
        for s in self.all:
            s.close()
        self._bound.clear()
        self._context.term()
