"""Tells a service manager about a foreground process, with the protocol of sd_notify(3): a datagram a message.

Outside of systemd there is no ``NOTIFY_SOCKET`` in the environment, and nothing is sent.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def notify(*lines: str) -> bool:
    """Sends assignments such as ``READY=1``; true if they were sent."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    # A leading @ stands for the zero byte of an abstract address.
    to = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s, suppress(OSError):
        s.sendto("\n".join(lines).encode(), to)
        return True
    return False


def watchdog_interval_s() -> float | None:
    """How often the service manager wants ``WATCHDOG=1``: half of its timeout; None: never."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        return int(os.environ["WATCHDOG_USEC"]) / 2e6
    except (KeyError, ValueError):
        return None
