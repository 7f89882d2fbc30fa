"""Decides which peers may connect to a coordinator's tcp sockets, and tells which were refused.

For each peer that has proved a CURVE key libzmq asks whether it may connect, over an inproc socket of the same
context (ZAP, rfc.zeromq.org/spec/27). Peers without keys, or with another server's, libzmq refuses by itself; the
socket's monitor tells of them. The wave thread reads both, so no other thread and no state outlives it. There is
one ZAP address in a context, so sockets with keys live in a context of their own.

The monitor also bounds what peers can hold before they have said who they are, with keys or without. libzmq
accepts every connection, and it aborts if no descriptor is left for an ipc socket. So at most `MAX_STRANGERS`
connections may be without a finished handshake: one more ends the oldest of them. The last quarter of the
descriptors is kept for ipc: a peer over tcp whose connection has a number in it is ended at once. libzmq itself
ends a connection whose handshake takes longer than `HANDSHAKE_TIMEOUT_MS`.
"""

from __future__ import annotations

import itertools
import os
import resource
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import zmq
from zmq.utils import z85

from dpshm.net.addresses import joined
from dpshm.net.context import Socket
from dpshm.net.keys import ServerKeys

ZAP_ADDRESS = "inproc://zeromq.zap.01"
_FRAMES = 7  # version, request, domain, address, identity, mechanism, key
_WRONG_SERVER_KEY = 0x11000001  # ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC
_MECHANISM_MISMATCH = 0x11000002
MAX_STRANGERS = 64
HANDSHAKE_TIMEOUT_MS = 2000
_EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_MONITORED = struct.Struct("=HI")  # a monitor's message: event, value. `zmq.utils.monitor` loads asyncio
_numbers = itertools.count()


class Authenticator:
    """Lets peers connect that have the clients' key, if there are keys. Used by one thread at a time.

    Args:
        context: of the sockets to guard.
        keys: the coordinator's; None lets every peer in.

    Attributes:
        exhausted: peers opened connections so fast that hardly a descriptor is left.
    """

    def __init__(self, context: zmq.Context[Socket], keys: ServerKeys | None) -> None:
        self._context = context
        self._keys = keys
        self._zap: Socket | None = None
        if keys is not None:
            self._client = z85.decode(keys.client)
            self._zap = context.socket(zmq.REP)
            self._zap.linger = 0
            self._zap.bind(ZAP_ADDRESS)
        self.exhausted = False
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] % (1 << 31)  # "unlimited" is -1
        self._kept_from = limit - limit // 4
        self._last = limit - limit // 8
        self._max_strangers = min(MAX_STRANGERS, limit // 8)
        self._strangers: dict[tuple[Socket, int], str] = {}  # those without a handshake, oldest first
        self._monitors: dict[Socket, Socket] = {}  # by what they monitor
        self._peers: dict[tuple[Socket, int], str] = {}  # accepted peers by monitor and descriptor
        self._failed: dict[Socket, str] = {}  # the reason, until the monitor's next message tells the descriptor

    @property
    def handlers(self) -> dict[Socket, Callable[[list[bytes]], str | None]]:
        """What handles the messages of each socket to poll; returns a sentence on a peer that was refused."""
        handlers: dict[Socket, Callable[[list[bytes]], str | None]] = {}
        if self._zap is not None:
            handlers[self._zap] = self._answer
        for monitor in self._monitors.values():
            handlers[monitor] = partial(self._observe, monitor)
        return handlers

    def guard(self, s: Socket) -> None:
        """Has a socket that is yet to be bound to tcp ask for keys, if there are any, and monitors it."""
        if s in self._monitors:
            return
        if self._keys is not None:
            self._keys.secure(s)
        s.handshake_ivl = HANDSHAKE_TIMEOUT_MS
        address = f"inproc://dpshm-monitor-{next(_numbers)}"
        s.monitor(address, _EVENTS)
        monitor: Socket = self._context.socket(zmq.PAIR)
        monitor.linger = 0
        monitor.rcvhwm = 0  # a full queue holds up libzmq's own thread, and with it all peers
        monitor.connect(address)
        self._monitors[s] = monitor

    def close(self) -> None:
        """Stops monitoring, and closes the sockets made here."""
        for guarded, monitor in self._monitors.items():
            with suppress(zmq.ZMQError):
                guarded.disable_monitor()
            monitor.close()
        if self._zap is not None:
            self._zap.close()

    def _answer(self, frames: list[bytes]) -> None:
        welcome = len(frames) == _FRAMES and frames[5] == b"CURVE" and frames[6] == self._client
        status = (b"200", b"OK") if welcome else (b"400", b"not a key of this group")
        assert self._zap is not None
        self._zap.send_multipart([b"1.0", frames[1], *status, b"", b""])

    def _observe(self, monitor: Socket, frames: list[bytes]) -> str | None:
        kind, value = _MONITORED.unpack(frames[0])
        if kind == zmq.EVENT_ACCEPTED:
            return self._accept(monitor, value)
        if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._strangers.pop((monitor, value), None)
        elif kind == zmq.EVENT_DISCONNECTED:
            peer = self._peers.pop((monitor, value), "a peer")
            self._strangers.pop((monitor, value), None)
            why = self._failed.pop(monitor, None)
            if why is not None and self._keys is not None:
                return (
                    f"{peer} at {frames[1].decode()} {why}. Peers of this group need its keys: a copy of "
                    "the coordinator's --curve-dir, named by DPSHM_CURVE_DIR"
                )
        else:
            self._failed[monitor] = _why(kind, value)
        return None

    def _accept(self, monitor: Socket, fd: int) -> str | None:
        peer = self._peers[monitor, fd] = self._strangers[monitor, fd] = _peer_name(fd)
        if fd >= self._kept_from:
            # Descriptors are given out lowest first: all below are taken.
            self.exhausted = self.exhausted or fd >= self._last
            del self._strangers[monitor, fd]
            _end(fd, peer)
            return (
                f"{peer}: {fd} file descriptors are taken, and the rest is kept for the peers of this machine. "
                "Raise the limit (ulimit -n, systemd's LimitNOFILE), or find what opens connections"
            )
        if len(self._strangers) > self._max_strangers:
            (_, oldest) = key = next(iter(self._strangers))
            _end(oldest, self._strangers.pop(key))
        return None


def _why(kind: int, value: int) -> str:
    if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return "has a client key that is not of this group"
    if kind == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == _WRONG_SERVER_KEY:
        return "has another server key"
    if kind == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value != _MECHANISM_MISMATCH:
        return f"does not speak ZMQ as it must ({value:#x})"
    return "has no keys, or left before it showed them"


def _end(fd: int, peer: str) -> None:
    """Ends the connection with a peer, if the descriptor, which is libzmq's, still means it. libzmq closes it."""
    try:
        own = os.dup(fd)  # from here on it cannot come to mean another file
    except OSError:
        return
    with suppress(OSError), socket.socket(fileno=own) as s:
        host, port = s.getpeername()[:2]
        if joined(host, port) == peer:
            s.shutdown(socket.SHUT_RDWR)


def _peer_name(fd: int) -> str:
    """The peer's address on a descriptor of libzmq's, which may be closed already."""
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
    return joined(host, port)
