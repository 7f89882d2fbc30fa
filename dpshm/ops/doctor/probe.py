"""Asks a coordinator's sockets whether the coordinator answers, without joining the group.

There are two questions. Does the socket accept a connection and send the first bytes of ZMTP? Then the process and
its I/O thread live. Does the front-ends' socket publish a state to a new subscriber? Then the wave thread lives.
"""

from __future__ import annotations

import socket
from contextlib import suppress

import zmq

from dpshm.net.context import Socket, context
from dpshm.net.keys import ClientKeys, connect
from dpshm.net.wire import decode_state

TIMEOUT_S = 3.0
SIGNATURE_BYTES = 10
"""A ZMTP peer sends 0xFF, eight bytes and 0x7F at once (ZMTP 3.1, section 3)."""


def connect_problem(address: str, timeout_s: float = TIMEOUT_S) -> str | None:
    """The reason why no ZMQ peer answers at an address; None if one does."""
    try:
        with _connect(address, timeout_s) as s:
            data = b""
            while len(data) < SIGNATURE_BYTES and (more := s.recv(SIGNATURE_BYTES - len(data))):
                data += more
    except TimeoutError:
        return "it accepts connections and says nothing: its process is stopped or wedged"
    except OSError as e:
        return e.strerror or str(e)
    except ValueError:
        return f"{address!r} is no address"
    if len(data) < SIGNATURE_BYTES or data[0] != 0xFF or data[9] != 0x7F:
        return f"what answers is not ZMQ: {data!r}"
    return None


def publishes(address: str, timeout_s: float = TIMEOUT_S, *, keys: ClientKeys | None = None) -> bool:
    """Whether a new subscriber of the front-ends' socket receives the state."""
    s: Socket = context().socket(zmq.SUB)
    try:
        s.linger = 0
        connect(s, address, keys)
        s.subscribe(b"")
        if not s.poll(round(timeout_s * 1000)):
            return False
        decode_state(s.recv())
    finally:
        with suppress(zmq.ZMQError):
            s.close()
    return True


def _connect(address: str, timeout_s: float) -> socket.socket:
    kind, _, where = address.partition("://")
    if kind == "ipc":
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            s.settimeout(timeout_s)
            s.connect(where)
        except BaseException:
            s.close()
            raise
        return s
    host, _, port = where.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout_s)
