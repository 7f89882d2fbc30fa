"""A relay's two sockets: `up` leads to the head, and `down` away from it.

    head      up: SUB, hears all nodes      down: XPUB, tells all nodes what it heard and its own news
    others    up: XPUB, to the head alone   down: SUB, hears all nodes but this one

The head's are bound to tcp, with keys as its other sockets. One connection of each kind leads from each node to
the head, and none between other nodes. A peer that does not read loses messages, and no one waits for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import zmq

from dpshm.coordinator.authenticator import Authenticator
from dpshm.linux.descriptors import check_spare
from dpshm.linux.forks import give_up_sockets, no_fork
from dpshm.net import wire
from dpshm.net.addresses import allow_ipv6, cannot_listen, joined
from dpshm.net.cuts import notice_cuts
from dpshm.net.keys import client_keys, connect
from dpshm.net.relay_wire import MAX_NEWS_BYTES, topic_of

if TYPE_CHECKING:
    from dpshm.coordinator.settings import Settings
    from dpshm.net.context import Socket
    from dpshm.net.keys import ServerKeys

RECEIVE_MS = 100
"""`hears.recv` waits for so long."""
MOST_WAITING = 256
"""Messages that wait for a peer that does not read; then it loses some."""
UPSTREAM_HWM = 1
"""Of subscriptions, a pipe holds one: why, `dpshm.coordinator.sockets` says."""


class RelaySockets:
    """The sockets of one node's relay, in a context of their own.

    Args:
        settings: the coordinator's.
        keys: the head's, for peers; None lets every peer connect.

    Attributes:
        hears: SUB: news of other nodes.
        tells: XPUB: this node's news.
        authenticator: decides on peers over tcp; at the head alone it has any.
    """

    def __init__(self, settings: Settings, keys: ServerKeys | None) -> None:
        self._settings, self._keys = settings, keys
        self._bound: list[str] = []
        self._addresses: tuple[str, str] | None = None
        self._open()

    def _open(self) -> None:
        settings = self._settings
        check_spare()
        self._context: zmq.Context[Socket] = zmq.Context()
        self.authenticator = Authenticator(self._context, self._keys)
        self.hears = self._context.socket(zmq.SUB)
        self.tells = self._context.socket(zmq.XPUB)
        self._connected = False
        for s in (self.hears, self.tells):
            s.linger = 0
            s.sndhwm = s.rcvhwm = MOST_WAITING
            notice_cuts(s)
        self.hears.maxmsgsize = MAX_NEWS_BYTES
        self.hears.rcvtimeo = RECEIVE_MS
        self.tells.maxmsgsize = wire.MAX_UPSTREAM_BYTES
        self.tells.rcvhwm = UPSTREAM_HWM
        self.tells.setsockopt(zmq.XPUB_VERBOSER, 1)  # each node that joins is told of, also a second time
        for node in range(settings.nodes):
            if node != settings.node:
                self.hears.subscribe(topic_of(node))

    @property
    def is_head(self) -> bool:
        """Whether the relays of other nodes meet here."""
        return self._settings.head is None

    def open(self, addresses: tuple[str, str] | None) -> str:
        """Binds or connects; returns the two addresses, as the header has them ("" if they are another node's).

        Args:
            addresses: to bind, as an earlier coordinator bound them; None: any port of the host.

        Raises:
            SettingError: an address cannot be bound.
        """
        if not self.is_head:
            if self._connected:
                return ""
            self._connected = True
            keys = None if self._settings.curve_dir is None else client_keys(self._settings.curve_dir)
            for s, address in zip((self.tells, self.hears), self._settings.head_relay, strict=True):
                connect(s, address, keys)
            return ""
        anywhere = f"tcp://{joined(self._settings.host, '*')}"
        wanted = addresses or (anywhere, anywhere)
        for s, address in zip((self.hears, self.tells), wanted, strict=True):
            self._bind(s, address)
        self._addresses = self._bound[0], self._bound[1]
        return ",".join(self._bound)

    def renew(self) -> None:
        """Ends every connection of a head, and binds new sockets to the same addresses.

        Raises:
            SettingError: an address is in use; try again.
            OSError: no file descriptor is left; try again.
        """
        self.close()
        self._open()
        self.open(self._addresses)

    def unbind(self) -> None:
        """Undoes `open` of a head."""
        for s, address in zip((self.hears, self.tells), self._bound, strict=False):
            s.unbind(address)
        self._bound.clear()

    def close(self) -> None:
        """Closes them; returns once the addresses are free."""
        self.authenticator.close()
        self.hears.close()
        self.tells.close()
        self._context.term()
        self._bound.clear()
        give_up_sockets(self, [])

    def _bind(self, s: Socket, address: str) -> None:
        self.authenticator.guard(s)
        allow_ipv6(s, address)
        try:
            with no_fork():  # a child that does not know the address yet would keep it
                s.bind(address)
                bound = s.getsockopt_string(zmq.LAST_ENDPOINT)
                give_up_sockets(self, [*self._bound, bound])
        except zmq.ZMQError as e:
            raise cannot_listen("the relay cannot bind", address, e) from e
        self._bound.append(bound)
