"""A coordinator's three sockets: made, bound, and bounded in what their peers can make them hold.

libzmq receives what peers send before the wave thread reads it, so the limits are set here:

- a message longer than any honest one ends the connection that it came from;
- a pipe from a front-end or to an engine (XPUB) holds one message at a time: an XPUB empties its pipes into a
  queue of its own whenever it is used, and with longer pipes a fast peer fills that queue at once;
- libzmq has no limit for the rest: that queue, where a peer may still be faster than the wave thread; the bytes of
  topics that a peer subscribes to (a node for each byte); the parts of a message. Against them there is
  `Sockets.renew`: it closes everything and binds the same addresses. What peers had piled up is gone, and honest
  peers reconnect; what was lost meanwhile the board tells.

The sockets are in a context of their own, for two reasons. Its end waits until all is closed, ipc paths too, so
the addresses can be bound again. And there is one ZAP address in a context (`dpshm.coordinator.authenticator`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

import zmq

from dpshm.board.files import NO_SPACE, why_no_space
from dpshm.coordinator.authenticator import Authenticator
from dpshm.errors import SegmentNoSpace
from dpshm.linux.descriptors import check_spare
from dpshm.linux.forks import give_up_sockets, no_fork
from dpshm.net import wire
from dpshm.net.addresses import allow_ipv6, cannot_listen
from dpshm.net.context import Socket
from dpshm.net.keys import ServerKeys

Addresses: TypeAlias = tuple[str, str, str]  # front-ends, to engines, from engines

UPSTREAM_HWM = 1
REPORTS_HWM = 100
"""Messages that a pipe holds; then its sender waits."""
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 60, 10, 3
"""A peer whose machine is gone is disconnected after a minute and a half."""


class Sockets:
    """The three sockets, and the addresses that they are bound to. Used by one thread at a time.

    Args:
        keys: what peers over tcp must have; None lets every peer connect.

    Attributes:
        keys: the same.
        frontends: XPUB: publications to stock front-ends, and what front-ends send.
        to_engines: XPUB: READY and START, and engines' subscriptions.
        from_engines: PULL: what engines report.
        authenticator: decides on peers over tcp.

    Raises:
        OSError: no file descriptor is left.
    """

    def __init__(self, keys: ServerKeys | None) -> None:
        self.keys = keys
        self._bound: dict[Socket, str] = {}
        self._files: dict[str, os.stat_result] = {}  # of ipc sockets, by path
        self._open()

    def _open(self) -> None:
        check_spare()
        self._context: zmq.Context[Socket] = zmq.Context()
        self.authenticator = Authenticator(self._context, self.keys)
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
            s.setsockopt(zmq.XPUB_VERBOSER, 1)  # every join and leave is passed on, also a peer's second

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

    def are_linked(self) -> bool:
        """Whether the files of the ipc sockets are there. If not, no peer can connect any more."""
        try:
            return all(os.path.samestat(os.stat(path), file) for path, file in self._files.items())
        except OSError:
            return False

    def unbind(self) -> None:
        """Unbinds all."""
        for s, address in self._bound.items():
            s.unbind(address)
        self._bound.clear()
        self._files.clear()

    def renew(self) -> None:
        """Ends every connection, and binds new sockets to the same addresses.

        Raises:
            SettingError: an address is in use; try again.
        SegmentNoSpace: no inode is left for it; try again.
            OSError: no file descriptor is left; try again.
        """
        self.close()
        self._open()
        self.bind(self._addresses)

    def close(self) -> None:
        """Closes all sockets; returns once the addresses are free."""
        self.authenticator.close()
        for s in self.all:
            s.close()
        self._bound.clear()
        self._files.clear()
        self._context.term()
        self._give_up()

    def _bind(self, s: Socket, address: str) -> str:
        if address.startswith("tcp:"):
            self.authenticator.guard(s)
        allow_ipv6(s, address)
        try:
            with no_fork():  # a child that does not know the address yet would keep it
                s.bind(address)
                self._bound[s] = bound = s.getsockopt_string(zmq.LAST_ENDPOINT)
                if bound.startswith("ipc:"):
                    path = bound.removeprefix("ipc://")
                    self._files[path] = os.stat(path)
                self._give_up()
        except zmq.ZMQError as e:
            if e.errno in NO_SPACE and address.startswith("ipc:"):
                folder = Path(address.removeprefix("ipc://")).parent
                raise SegmentNoSpace(why_no_space(folder, "a socket")) from e
            raise cannot_listen("cannot bind", address, e) from e
        return self._bound[s]

    def _give_up(self) -> None:
        """Has forked children close what is bound here, and its connections."""
        give_up_sockets(self, self._bound.values())
