"""The doorkeeper: answers who may come in through a coordinator's tcp sockets, and tells who was refused.

libzmq asks for each peer that has proved a CURVE key whether it may come in, over an inproc socket of the same
context (ZAP, rfc.zeromq.org/spec/27); peers without keys, or with another server's, it refuses by itself, and
tells whoever monitors the socket. Both are read in the wave thread: no thread more, and no state outlives it.
The ZAP address is one a context, so sockets with keys live in a context of their own.
"""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import zmq
from zmq.utils import z85

from dpshm.net.context import Socket
from dpshm.net.keys import ServerKeys

ZAP_ADDRESS = "inproc://zeromq.zap.01"
_FRAMES = 7  # version, request, domain, address, identity, mechanism, key
_WRONG_SERVER_KEY = 0x11000001  # ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC
_MECHANISM_MISMATCH = 0x11000002
_EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_TOLD = struct.Struct("=HI")  # what a monitor says: event and value; `zmq.utils.monitor` would load asyncio
_numbers = itertools.count()


class Authenticator:
    """Lets in whoever has the clients' key. Used in the wave thread alone.

    Args:
        context: of the sockets to guard.
        keys: the coordinator's.
        refused: called with a sentence about each peer that was refused.
    """

    def __init__(self, context: zmq.Context[Socket], keys: ServerKeys, refused: Callable[[str], None]) -> None:
        self._context = context
        self._keys = keys
        self._refused = refused
        self._client = z85.decode(keys.client)
        self._zap: Socket = context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind(ZAP_ADDRESS)
        self._monitors: dict[Socket, Socket] = {}  # by what they monitor
        self._peers: dict[tuple[Socket, int], str] = {}  # by descriptor: who was accepted
        self._failed: dict[Socket, str] = {}  # why, until the next line tells whose descriptor it was

    @property
    def takers(self) -> dict[Socket, Callable[[list[bytes]], None]]:
        """The sockets to poll, and what takes their messages."""
        takers: dict[Socket, Callable[[list[bytes]], None]] = {self._zap: self._answer}
        for monitor in self._monitors.values():
            takers[monitor] = partial(self._take, monitor)
        return takers

    def guard(self, s: Socket) -> None:
        """Has a socket, yet to be bound, ask for keys; and looks who is refused."""
        if s in self._monitors:
            return
        self._keys.secure(s)
        address = f"inproc://dpshm-door-{next(_numbers)}"
        s.monitor(address, _EVENTS)
        monitor: Socket = self._context.socket(zmq.PAIR)
        monitor.linger = 0
        monitor.rcvhwm = 0  # a full queue would hold up libzmq's own thread, and with it all peers
        monitor.connect(address)
        self._monitors[s] = monitor

    def close(self) -> None:
        """Closes its own sockets; those that it guards first stop telling."""
        for guarded, monitor in self._monitors.items():
            with suppress(zmq.ZMQError):
                guarded.disable_monitor()
            monitor.close()
        self._zap.close()
        del self._refused  # which refers back: the memory goes with the last handle

    def _answer(self, frames: list[bytes]) -> None:
        welcome = len(frames) == _FRAMES and frames[5] == b"CURVE" and frames[6] == self._client
        status = (b"200", b"OK") if welcome else (b"400", b"not a key of this group")
        self._zap.send_multipart([b"1.0", frames[1], *status, b"", b""])

    def _take(self, monitor: Socket, frames: list[bytes]) -> None:
        kind, value = _TOLD.unpack(frames[0])
        if kind == zmq.EVENT_ACCEPTED:
            self._peers[monitor, value] = _peer_name(value)
        elif kind == zmq.EVENT_DISCONNECTED:
            peer = self._peers.pop((monitor, value), "a peer")
            why = self._failed.pop(monitor, None)
            if why is not None:
                self._refused(
                    f"{peer} at {frames[1].decode()} {why}. Peers of this group need its keys: a copy of "
                    "the coordinator's --curve-dir, named by DPSHM_CURVE_DIR"
                )
        else:
            self._failed[monitor] = _why(kind, value)


def _why(kind: int, value: int) -> str:
    if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return "has a client key that is not of this group"
    if kind == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == _WRONG_SERVER_KEY:
        return "has another server key"
    if kind == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value != _MECHANISM_MISMATCH:
        return f"does not speak ZMQ as it must ({value:#x})"
    return "has no keys, or left before it showed them"


def _peer_name(fd: int) -> str:
    """Who is connected to a descriptor of libzmq's; it may be closed already."""
    try:
        borrowed = socket.socket(fileno=fd)
    except OSError:
        return "a peer that has left"
    try:
        host, port = borrowed.getpeername()[:2]
    except (OSError, ValueError):
        return "a peer that has left"
    finally:
        borrowed.detach()
    return f"{host}:{port}"
