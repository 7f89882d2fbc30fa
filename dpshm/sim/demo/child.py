"""The child's side of a demo process: its orders, its answers, and when to end.

A child ends when its parent is gone, for any reason, or when it gets SIGTERM or SIGINT. Both wake a ZMQ poller, so
a child may sleep without a time limit.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from typing import Protocol, TypeVar

import msgspec
import zmq

from dpshm.linux.processes import parent_pidfd
from dpshm.linux.signals import EndRequest

CHECK_INTERVAL_S = 0.05
"""Interval at which `Lifeline.ended` checks the parent; each check is a system call."""

T = TypeVar("T")


def read_line(kind: type[T]) -> T:
    """The next line from the parent. Ends this process without an error if there is none."""
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        raise SystemExit(1)  # the parent died while it wrote
    return msgspec.json.decode(line, type=kind)


def write_line(message: msgspec.Struct) -> None:
    """Sends one line to the parent. A parent that is gone is no error: the lifeline notices it."""
    try:
        sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        # What is left in the buffer must not raise again when the interpreter flushes it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class EndSignal(Protocol):
    """The part of `Lifeline` that the loops of engines and front-ends use."""

    def register(self, poller: zmq.Poller) -> None:
        """Makes a poller return when the answer may have changed."""

    def ended(self) -> bool:
        """Whether to end."""


class Lifeline:
    """Tells a child when to end. Make one per process, in its main thread."""

    def __init__(self, parent_pid: int) -> None:
        self._ended = False
        self._request = EndRequest((signal.SIGTERM, signal.SIGINT))
        self._parent = parent_pidfd(parent_pid)
        self._poll = select.poll()
        self._poll.register(self._parent, select.POLLIN)
        self._next_check = 0.0

    def register(self, poller: zmq.Poller) -> None:
        """Makes a poller return when the child is to end."""
        poller.register(self._request.fileno(), zmq.POLLIN)
        poller.register(self._parent, zmq.POLLIN)

    def ended(self) -> bool:
        """Whether the child is to end; cheap enough for every turn of a loop."""
        if self._request.signum:
            return True
        if not self._ended and (now := time.monotonic()) >= self._next_check:
            self._next_check = now + CHECK_INTERVAL_S
            self._ended = bool(self._poll.poll(0))
        return self._ended
