"""What travels between the soak's processes: Unix datagrams, which arrive or are refused at once.

So it is always clear where a request is: what a process had in its inbox dies with it, and what it has sent is in
its peer's inbox.
"""

from __future__ import annotations

import socket
import struct

BATCH = 64
"""So many answers are in one datagram at most."""
REQUEST = struct.Struct("<6q")
"""Number, row, slot and life of the front-end, prompt tokens, wave."""
REFUSALS = (BlockingIOError, ConnectionRefusedError, FileNotFoundError)


def inbox(name: str) -> socket.socket:
    """The socket of that name."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    made.bind(f"\0{name}")
    return made


def engine_inbox(group: str, dp_rank: int, incarnation: int) -> str:
    """The name of an engine's inbox; a successor has another."""
    return f"{group}-engine-{dp_rank}-{incarnation}"


def frontend_inbox(group: str, life: int) -> str:
    """The name of a front-end's inbox."""
    return f"{group}-frontend-{life}"
