"""Limit: two processes pass a word to and fro in shared memory. Half a round trip is the lower bound of freshness.

They run the same Python, with the same kind of access as the board's, and do nothing else.
"""

from __future__ import annotations

import mmap
import tempfile
import time
from pathlib import Path

from bench.distribution import quantiles
from bench.processes import Line, Worker, use_reader_core

WORDS_APART = 16  # 128 bytes: the adjacent-line prefetcher moves lines in pairs


def limit(round_trips: int = 50_000) -> dict[str, float]:
    """One-way times in microseconds: half of each round trip."""
    shm = Path("/dev/shm")
    with tempfile.NamedTemporaryFile(dir=shm if shm.is_dir() else None) as file:
        file.truncate(mmap.PAGESIZE)
        with Worker(bat, file.name, round_trips, 0) as near, Worker(bat, file.name, round_trips, 1) as far:
            for worker in (near, far):
                worker.wait_ready()
            for worker in (far, near):
                worker.tell()
            return quantiles(near.result())


def bat(line: Line, path: str, round_trips: int, side: int) -> list[float]:
    """One side; side 0 serves, on the reader's core, and times."""
    if side == 0:
        use_reader_core()
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped, memoryview(mapped).cast("q") as words:
        line.ready()
        monotonic_ns = time.monotonic_ns
        ours, theirs = (0, WORDS_APART) if side == 0 else (WORDS_APART, 0)
        if side == 1:
            for i in range(1, round_trips + 1):
                while words[theirs] != i:
                    pass
                words[ours] = i
            return []
        times = []
        for i in range(1, round_trips + 1):
            began = monotonic_ns()
            words[ours] = i
            while words[theirs] != i:
                pass
            times.append((monotonic_ns() - began) / 2e3)
        return times
