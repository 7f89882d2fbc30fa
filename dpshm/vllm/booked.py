"""How much of each request's prompt an API server expects to be cached, told to the engine in shared memory.

A front-end books the tokens that are to be computed, and the engine has to subtract the same number when the
request comes in: then the sums are exact (rule 3). A request of vLLM has no field for a number of ours. So the
API server leaves it in a table, by a hash of the request's id, before it sends the request, and the engine
looks there. (The engine could also look up the prompt itself; but its cache may have changed since, and then
the sums are off.)

    file         booked-FRONTEND-INCARNATION, in the folder of the group's sockets, mode 0600; 128 KiB
    word         upper 40 bits of the hash | 24 bits: tokens expected in the cache
    its place    lower 14 bits of the hash

A word may be overwritten before the engine reads it: by one of the requests that the API server sends within
that time, each with probability 1 in 16,384. The engine then counts the whole prompt as received, more than was
sent. The rank's sum is too small by that hit. The error ends when the API server next books at that rank, or
when a request of its own ends there, because it then starts from the larger of the two counts
(`dpshm.frontend.row`). Tokens that are in flight hide the difference, so the error ends at the latest when
nothing of that API server is in flight.

SYNC: one writer, one store a request. The request travels through a socket, two system calls, so its engine sees
the word.
"""

from __future__ import annotations

import mmap
import os
import stat
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from dpshm.board.board import Board
from dpshm.vllm.log import logger

SLOTS = 1 << 14
MAX_TOKENS = (1 << 24) - 1
_BYTES = SLOTS * 8
_TAG = ((1 << 64) - 1) ^ MAX_TOKENS


def _path(board: Board, frontend: int) -> Path:
    incarnation = int(board.frontend_incarnation[frontend])
    return board.segment.sockets_path / f"booked-{frontend}-{incarnation}"


def _hash(request_id: str) -> int:
    return int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest(), "little")


class BookedWriter:
    """An API server's end."""

    def __init__(self, board: Board, frontend: int) -> None:
        """Makes the table.

        Args:
            board: the group's.
            frontend: this front-end's row.

        Raises:
            OSError: there is no room for it.
        """
        self._path = path = _path(board, frontend)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.posix_fallocate(
                    fd, 0, _BYTES
                )  # with ftruncate alone, a full tmpfs would kill this process later
                self._words = memoryview(mmap.mmap(fd, _BYTES)).cast("Q")
            finally:
                os.close(fd)
            draft.replace(path)
        except OSError:
            with suppress(OSError):
                draft.unlink()
            raise

    def tell(self, request_id: str, cached_tokens: int) -> None:
        """Tells what is expected of a request that is about to be sent; also that nothing is."""
        number = _hash(request_id)
        self._words[number % SLOTS] = number & _TAG | min(cached_tokens, MAX_TOKENS)

    def close(self) -> None:
        """Removes the table. Engines that have it mapped keep it."""
        self._words.release()
        with suppress(OSError):
            self._path.unlink()


class BookedReader:
    """An engine's end: the tables of all API servers, each mapped at its first request."""

    def __init__(self, board: Board) -> None:
        self._board = board
        # By front-end: where on the board its incarnation is, the incarnation, and its table.
        self._tables: dict[int, tuple[int, int, memoryview | None]] = {}
        self._warned = False

    def cached_tokens(self, frontend: int, request_id: str) -> int:
        """Prompt tokens of a request that its front-end expects to be cached and has not booked."""
        known = self._tables.get(frontend)
        at = self._board.index("frontend_incarnation", frontend) if known is None else known[0]
        incarnation = self._board.words[at]
        if known is None or known[1] != incarnation:
            known = self._tables[frontend] = at, incarnation, self._open(frontend)
        words = known[2]
        if words is None:
            return 0
        number = _hash(request_id)
        word = words[number % SLOTS]
        return word & MAX_TOKENS if not (word ^ number) & _TAG else 0

    def _open(self, frontend: int) -> memoryview | None:
        """The table of a front-end; None if it has none, because it knows of no cache."""
        path = _path(self._board, frontend)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as e:
            self._warn(path, e.strerror)
            return None
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_size != _BYTES:
                self._warn(path, f"it has {info.st_size} bytes, not {_BYTES}")
                return None
            return memoryview(mmap.mmap(fd, _BYTES, access=mmap.ACCESS_READ)).cast("Q")
        except OSError as e:
            self._warn(path, e.strerror)
            return None
        finally:
            os.close(fd)

    def _warn(self, path: Path, why: str | None) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("dpshm: %s is not used, cached tokens count as work for a moment: %s", path, why)
