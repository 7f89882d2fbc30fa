"""How long requests took, by rank: histograms in shared memory, which one front-end writes and tools sum.

A front-end keeps a file ``latency-F`` in the folder of its group's sockets, F being its row. It makes the file for
the ranks that the group has, not for those that the board has room for, and lengthens it when the group grows. The
file goes with the group. The next front-end in the row goes on counting in it, so no count ever falls.

    offset 0     +------------------------------------------------------------------+
                 | magic 8 | version 8 |                                            |  128 bytes
    offset 128   +------------------------------------------------------------------+
                 | rank 0: a histogram of each of `KINDS`                           |  768 bytes each
                 | rank 1: ...                                                      |
                 +------------------------------------------------------------------+

A histogram is 32 words: for each limit of `LIMITS_S` how many requests took no longer than it and longer than the
limit before, then how many took longer than all, then the sum of all times in nanoseconds.

SYNC: one writer, any number of readers, no lock, no order. Each word only grows, and is stored whole. A reader may
see a request in its bucket and not yet in the sum.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dpshm.board.files import NO_SPACE, why_no_space
from dpshm.board.layout import WORD_BYTES
from dpshm.board.words import MAX_WORD
from dpshm.errors import SegmentError, SegmentNoSpace

if TYPE_CHECKING:
    from dpshm.board.board import Board

KINDS = ("ttft", "queue", "per_token")
"""Time to first token, from the booking on; time in the engine's queue, as the engine tells it; time per output
token after the first."""
LIMITS_S = tuple(float(f"{mantissa}e{power}") for power in range(-3, 3) for mantissa in (1, 1.6, 2.5, 4, 6.3))
"""Upper limits of the buckets: five in each decade, from 1 ms to 630 s, each about 1.6 times the one before."""
BUCKETS = len(LIMITS_S) + 1
TTFT, QUEUE, PER_TOKEN = range(len(KINDS))

MAGIC = int.from_bytes(b"DPSHMLAT", "little") & ((1 << 63) - 1)
VERSION = 1
_LIMITS_NS = tuple(round(limit * 1e9) for limit in LIMITS_S)
_HISTOGRAM_WORDS = BUCKETS + 1
_RANK_WORDS = _HISTOGRAM_WORDS * len(KINDS)
_HEADER_WORDS = 16
_SUM_AT = tuple(_HEADER_WORDS + (kind + 1) * _HISTOGRAM_WORDS - 1 for kind in range(len(KINDS)))  # of rank 0
_SANE = 1 << 61


def latency_path(folder: Path, frontend: int) -> Path:
    """The file of a front-end's row, in the folder of its group's sockets."""
    return folder / f"latency-{frontend}"


def file_bytes(ranks: int) -> int:
    """The size of a file for so many ranks."""
    return (_HEADER_WORDS + ranks * _RANK_WORDS) * WORD_BYTES


class LatencyWriter:
    """The writing end, of one front-end. Its calls are made under the front-end's lock.

    Attributes:
        newest: by kind and rank, the bucket of the newest time, which is most often that of the next: the limits
            above and up to which it counts, the place of its word and that of the sum.
        words: the file; `counts` has the same numbers.

    Args:
        path: from `latency_path`. A file that is there is gone on with, unless it is of another version.
        ranks: the ranks to begin with.

    Raises:
        SegmentNoSpace: the file system is full.
        SegmentError: the file cannot be made.
    """

    def __init__(self, path: Path, ranks: int) -> None:
        self._path = path
        self._ranks = 0
        self.newest: list[list[tuple[int, int, int, int]]] = [[] for _ in KINDS]
        self._grow(ranks)

    def observe(self, dp_rank: int, kind: int, took_ns: int) -> None:
        """Counts a request of a rank.

        Args:
            dp_rank: the rank.
            kind: which of `KINDS`.
            took_ns: how long it took.

        Raises:
            SegmentError: the rank is new, and there is no room for it. Nothing was counted.
        """
        if dp_rank >= self._ranks:
            self._grow(dp_rank + 1)
        above, most, at, total = self.newest[kind][dp_rank]
        if not above < took_ns <= most:
            took_ns, at, total = self._look_up(dp_rank, kind, took_ns)
        words, counts = self.words, self.counts
        # Without a call from here on: a signal handler that observes, too, does so before this or after it.
        words[at] = counts[at] = counts[at] + 1
        words[total] = counts[total] = counts[total] + took_ns

    def _look_up(self, dp_rank: int, kind: int, took_ns: int) -> tuple[int, int, int]:
        """The time, if it is none below 0, the word of its bucket and that of the sum; notes the bucket."""
        took_ns, bucket = max(0, took_ns), bisect_left(_LIMITS_NS, took_ns)
        total = dp_rank * _RANK_WORDS + _SUM_AT[kind]
        at = total - BUCKETS + bucket
        above, most = (-1, *_LIMITS_NS)[bucket], (*_LIMITS_NS, MAX_WORD)[bucket]
        self.newest[kind][dp_rank] = (above, most, at, total)
        return took_ns, at, total

    def _grow(self, ranks: int) -> None:
        try:
            size = file_bytes(ranks)
            fd = _open(self._path)
            try:
                size = max(size, os.fstat(fd).st_size // WORD_BYTES * WORD_BYTES)
                # With ftruncate alone a full tmpfs would kill the front-end with SIGBUS later.
                os.posix_fallocate(fd, 0, size)
                words = memoryview(mmap.mmap(fd, size)).cast("q")
            finally:
                os.close(fd)
        except OSError as e:
            if e.errno in NO_SPACE:
                raise SegmentNoSpace(why_no_space(self._path.parent, "a file of latencies", size)) from e
            raise SegmentError(f"cannot open {self._path}: {e.strerror}") from e
        words[0], words[1] = MAGIC, VERSION
        self.words, self.counts = words, [max(0, min(count, _SANE)) for count in words.tolist()]
        self._ranks = (len(words) - _HEADER_WORDS) // _RANK_WORDS
        for of_kind in self.newest:
            of_kind.extend([(0, -1, 0, 0)] * (self._ranks - len(of_kind)))


def read_latencies(board: Board) -> NDArray[np.int64] | None:
    """How long requests took, summed over all front-ends that the group has had.

    Returns:
        An array of shape (dp_size, len(KINDS), BUCKETS + 1): counts by bucket, not cumulative, and the sum in
        nanoseconds; a copy. None if there is no folder of the group's sockets, or this user may not enter it.
    """
    ranks, folder = board.dp_size, board.segment.sockets_path
    if not os.access(folder, os.X_OK):
        return None
    total = np.zeros((ranks, len(KINDS), _HISTOGRAM_WORDS), np.int64)
    for frontend in range(board.frontends_used()):
        with suppress(OSError, ValueError):
            fd = os.open(latency_path(folder, frontend), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if not _is_of_this_version(fd):
                    continue
                words = np.frombuffer(mmap.mmap(fd, 0, access=mmap.ACCESS_READ), np.int64)
            finally:
                os.close(fd)
            n = min(ranks, (len(words) - _HEADER_WORDS) // _RANK_WORDS)
            of_ranks = words[_HEADER_WORDS : _HEADER_WORDS + n * _RANK_WORDS].reshape(total[:n].shape)
            total[:n] = np.minimum(total[:n] + np.clip(of_ranks, 0, _SANE), _SANE)  # whatever a word says
    return total


def _open(path: Path) -> int:
    """A descriptor of a front-end's file: of one of this version if there is one, else of a new one."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if not os.fstat(fd).st_size or _is_of_this_version(fd):
                return fd
            path.unlink()  # not truncated: a reader may have it mapped
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_of_this_version(fd: int) -> bool:
    expected = MAGIC.to_bytes(WORD_BYTES, "little") + VERSION.to_bytes(WORD_BYTES, "little")
    return os.pread(fd, 2 * WORD_BYTES, 0) == expected
