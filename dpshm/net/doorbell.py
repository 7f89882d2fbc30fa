"""Doorbells: a front-end wakes sleeping ranks itself, two hops and two threads earlier than the coordinator does.

Each engine has a datagram socket (unix(7)) in the folder of its group's sockets. A front-end whose request finds
the ranks paused sends START to all of them but the one that gets the request: the bytes that the coordinator is
about to send, and the same rule handles them. It is a START that comes early, and it may be late, lost or doubled
as any other START may. A rank that is in a later wave drops it. Rank 0 tells the coordinator, which may have heard
nothing yet, or be dead. A rank that misses the ring, because its queue is full or it has no doorbell (a stock
engine, or one on another node), receives the coordinator's START. `tests/property` explores groups that are rung.

The rank that gets the request is left out because a ring is faster than a request: the rank would begin a step
without the request, and the request would wait for the end of that step. The others wait for that rank in their
first collective.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

from dpshm.board.files import NO_SPACE, why_no_space
from dpshm.errors import SegmentNoSpace
from dpshm.linux.forks import close_socket, give_up, no_fork
from dpshm.net import wire

logger = logging.getLogger(__name__)

MOST_RANKS = 64
"""Above this many ranks no doorbell is rung: each costs about 3 us inside `Frontend.route`."""
_MOST_AT_ONCE = 64  # so that a flood cannot keep an engine from its work
_MOST_BYTES = 64  # a START has 12 at most


def _path(folder: Path, dp_rank: int) -> str:
    return str(folder / f"bell-{dp_rank}")


class Doorbell:
    """A rank's end.

    Attributes:
        socket: readable after a ring.
    """

    def __init__(self, folder: Path, dp_rank: int) -> None:
        """Binds the rank's socket, in place of a predecessor's.

        Args:
            folder: the folder of the group's sockets.
            dp_rank: a rank whose row this process holds, so no other process binds this path.

        Raises:
            SegmentNoSpace: the file system has no inode left.
            OSError: the path cannot be bound.
        """
        self._path = _path(folder, dp_rank)
        try:
            self.socket, self._file = self._bind()
        except OSError as e:
            if e.errno in NO_SPACE:
                raise SegmentNoSpace(why_no_space(folder, "a socket")) from e
            raise

    def _bind(self) -> tuple[socket.socket, os.stat_result]:
        with suppress(FileNotFoundError):
            Path(self._path).unlink()
        with no_fork():
            s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            give_up(s, close_socket)
        try:
            s.bind(self._path)
            return s, Path(self._path).stat()
        except BaseException:
            s.close()
            raise

    def restore(self) -> None:
        """Binds the path again if it was removed. The socket's descriptor keeps its number.

        A poll(2) of the number goes on as before. An epoll(7) that has it has to register it again.

        Raises:
            OSError: the path cannot be bound.
        """
        with suppress(FileNotFoundError):
            if os.path.samestat(Path(self._path).stat(), self._file):
                return
        s, self._file = self._bind()
        os.dup2(s.fileno(), self.socket.fileno(), inheritable=False)
        s.close()

    def drain(self) -> list[bytes]:
        """The datagrams received since the last call, oldest first: second frames of STARTs, or other bytes."""
        rung: list[bytes] = []
        try:
            while len(rung) < _MOST_AT_ONCE:
                rung.append(self.socket.recv(_MOST_BYTES))
        except BlockingIOError:
            pass
        return rung

    def close(self) -> None:
        """Removes the path, unless a new group of the same name has bound it meanwhile."""
        with suppress(OSError):
            if os.path.samestat(Path(self._path).stat(), self._file):
                Path(self._path).unlink()
        self.socket.close()


def open_doorbell(folder: Path, dp_rank: int) -> Doorbell | None:
    """A rank's doorbell. If the path cannot be bound: None, and a warning. Raises OSError (EMFILE, ENFILE)."""
    try:
        return Doorbell(folder, dp_rank)
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE):
            raise
        logger.warning("rank %d has no doorbell and wakes up a little later: %s", dp_rank, e)
        return None


class DoorbellClient:
    """A front-end's end."""

    def __init__(self, folder: Path, dp_size: int) -> None:
        """Raises OSError: there is no descriptor for it."""
        self._folder = folder
        self.expect(dp_size)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def expect(self, dp_size: int) -> None:
        """Sets the number of ranks; any of them may have a doorbell. More than `MOST_RANKS` are not rung."""
        self._bells = {e: _path(self._folder, e) for e in range(dp_size)} if dp_size <= MOST_RANKS else {}

    def ring(self, wave: int, leave_out: int | None = None) -> None:
        """Sends START to the ranks, without waiting.

        Args:
            wave: the wave to wake them for.
            leave_out: the rank that a request is about to wake.
        """
        start, send = wire.encode_start(wave, None)[1], self._socket.sendto
        for dp_rank, path in list(self._bells.items()):
            if dp_rank == leave_out:
                continue
            try:
                send(start, path)
            except (FileNotFoundError, ConnectionRefusedError):
                del self._bells[dp_rank]  # it has no doorbell: not tried again until `expect`
            except OSError:  # its queue is full: it has not yet read earlier rings
                pass

    def close(self) -> None:
        """Gives the descriptor back."""
        self._socket.close()
