"""Locks on single bytes of a group's lock file: they tell which coordinator, engines and front-ends live.

Each user of a segment holds an open-file-description lock (fcntl(2), ``F_OFD_SETLK``) on the byte at which its row
begins in the segment. The kernel drops the lock with the last descriptor of that open file, however the process
ends, and other processes see it across pid namespaces. A lock over all bytes is granted only if no other handle
holds a lock: then the segment is dead.

The locks are in a file of their own, which only the owner may open. A process that may read a file can place read
locks on it. On the segment, which others may be let read, these would keep every user out and make the dead look
alive.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterable
from functools import cache

from dpshm.board.layout import Column

_FLOCK = struct.Struct("@hhqqi0q")  # struct flock: l_type, l_whence, l_start, l_len, l_pid (0 for OFD locks)
_UNLOCKED = struct.pack("h", fcntl.F_UNLCK)


def coordinator_byte(columns: dict[str, Column]) -> int:
    """The byte that a living coordinator holds: the first of its row."""
    return columns["control"].offset


def engine_byte(columns: dict[str, Column], dp_rank: int) -> int:
    """The byte that a living engine holds: the first of its row."""
    return _first_byte(columns["engine_state"], dp_rank)


def frontend_byte(columns: dict[str, Column], index: int) -> int:
    """The byte that a living front-end holds: the first of its row."""
    return _first_byte(columns["frontend_beat"], index)


def _first_byte(column: Column, row: int) -> int:
    return column.offset + row * column.strides[0]  # not ROW_BYTES: a newer version's rows may be wider


@cache
def lock_request(kind: int, start: int, length: int) -> bytes:
    """A ``struct flock``.

    Args:
        kind: ``fcntl.F_WRLCK`` or ``fcntl.F_UNLCK``.
        start: the first byte.
        length: how many bytes; 0 means all from `start` on.
    """
    return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)


def try_lock(fd: int, request: bytes) -> bool:
    """Asks for a lock without waiting. False if another open file holds one that is in the way."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock(fd: int, request: bytes) -> None:
    """Gives a lock back."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)


def _others_hold(fd: int, start: int, length: int) -> bool:
    # The kernel leaves out the locks of this descriptor. Its answer begins with the kind of the lock in the way.
    return fcntl.fcntl(fd, fcntl.F_OFD_GETLK, lock_request(fcntl.F_WRLCK, start, length))[:2] != _UNLOCKED


class Locks:
    """The locks that one descriptor holds, and the questions about the locks of others.

    Args:
        fd: a descriptor of the lock file, which the segment closes.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._held: set[int] = set()

    def lock(self, byte: int) -> bool:
        """Locks a byte. False if another handle holds it."""
        granted = try_lock(self.fd, lock_request(fcntl.F_WRLCK, byte, 1))
        if granted:
            self._held.add(byte)
        return granted

    def lock_all(self) -> bool:
        """Locks every byte at once. Granted only if no other handle is attached for writing."""
        return try_lock(self.fd, lock_request(fcntl.F_WRLCK, 0, 0))

    def unlock(self, byte: int) -> None:
        """Gives the lock on a byte back."""
        unlock(self.fd, lock_request(fcntl.F_UNLCK, byte, 1))
        self._held.discard(byte)

    def is_locked(self, byte: int) -> bool:
        """Whether any handle, this one included, holds a byte."""
        return self.each_locked((byte,))[0]

    def each_locked(self, in_bytes: Iterable[int]) -> list[bool]:
        """`is_locked` of each of these bytes."""
        fd, held = self.fd, self._held
        return [byte in held or _others_hold(fd, byte, 1) for byte in in_bytes]

    def is_shared(self) -> bool:
        """Whether another handle holds any byte."""
        return _others_hold(self.fd, 0, 0)
