"""A front-end's wake-up of paused ranks: their doorbells, and one message to the coordinator.

A wake-up never waits: both sockets drop a message that they cannot accept. A lost wake-up does no harm, because
the engine that receives the request wakes the others.
"""

from __future__ import annotations

import logging

import zmq

from dpshm.board.segment import Segment
from dpshm.net import wire
from dpshm.net.context import Socket, context
from dpshm.net.doorbell import DoorbellClient
from dpshm.net.keys import ClientKeys, connect

logger = logging.getLogger(__name__)


class Wakeup:
    """Wakes the ranks of one group. Opens its sockets at the first wake-up. Called under the front-end's lock."""

    def __init__(self, segment: Segment, keys: ClientKeys | None) -> None:
        self._segment = segment
        self._keys = keys
        self._doorbells: DoorbellClient | None = None
        self._rung = -1  # the wave for which the ranks were rung last
        self._socket: Socket | None = None

    def expect(self, dp_size: int) -> None:
        """The ranks or their marks changed: any of so many ranks may have a doorbell now."""
        if self._doorbells is not None:
            self._doorbells.expect(dp_size)

    def wake(
        self, wave: int, dp_size: int, *, receiver: int | None, ring: bool = True, again: bool = False
    ) -> None:
        """Wakes all ranks of a paused group; does nothing in a group without waves.

        Args:
            wave: the wave in which the group is paused.
            dp_size: how many ranks there are.
            receiver: the rank that a request is about to wake; None: no rank.
            ring: whether to ring the doorbells.
            again: rings also if it has rung for this wave: no coordinator repeats START.
        """
        if not self._segment.header.waves:
            return
        try:
            if ring and (again or wave != self._rung) and self._segment.linked:
                if self._doorbells is None:
                    self._doorbells = DoorbellClient(self._segment.sockets_path, dp_size)
                self._doorbells.ring(wave, leave_out=receiver)
                self._rung = wave
        except OSError as e:  # no descriptor for a socket
            logger.warning("could not ring the ranks: %s; the coordinator will wake them", e)
        try:
            if self._socket is None:
                self._socket = self._connect()
            self._socket.send(wire.encode_first_request(receiver, wave), zmq.NOBLOCK)
        except (OSError, zmq.ZMQError) as e:  # no descriptor for a socket, or no room in it
            logger.warning("could not send a wake-up: %s; the engine will wake the others", e)

    def tell_heard(self, dp_ranks: list[int]) -> None:
        """Tells the coordinator of live connections to ranks. A word that is lost is said again."""
        try:
            if self._socket is None:
                self._socket = self._connect()
            self._socket.send(wire.encode_heard(dp_ranks), zmq.NOBLOCK)
        except (OSError, zmq.ZMQError) as e:  # no descriptor for a socket, or no room in it
            logger.debug("could not tell of connections to ranks: %s", e)

    def close(self) -> None:
        """Closes the sockets."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._doorbells is not None:
            self._doorbells.close()

    def _connect(self) -> Socket:
        # An XSUB without a subscription: it sends upstream, and no broadcast is sent to it.
        sock = context().socket(zmq.XSUB)
        sock.linger = 0
        sock.reconnect_ivl = 50
        connect(sock, self._segment.header.stats_address, self._keys)
        return sock
