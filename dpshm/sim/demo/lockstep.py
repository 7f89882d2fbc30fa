"""A stand-in for the all-reduce: ranks enter each step together, and it lasts as long as the slowest rank's.

In a mixture-of-experts model the ranks exchange tokens in every layer, so no rank finishes a step before
all do. Here a rank that enters round r stores one word: the round, whether it has work, and the duration of its
own step. Then it waits until every rank has stored its word of that round. All of them now hold the
same values, so all sleep equally long and draw the same conclusions. As in
vLLM they ask "has any rank work?" only every ``AGREEMENT_INTERVAL`` steps; between two agreements an idle
rank runs dummy steps.

The words live in an anonymous memfd that the processes inherit, so no file in /dev/shm remains when they die.
Each rank has two slots, by the parity of the round. Two are enough: a rank enters round r + 2 only
when all have entered r + 1, hence when all have read the words of round r. So a slot that a waiting rank
reads holds round r, or r - 2 of a rank that has not entered yet, and never a later one.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from typing import NamedTuple

from dpshm.errors import SettingError

AGREEMENT_INTERVAL = 32
"""Rounds from one agreement to the next. vLLM's ``DPEngineCoreProc`` asks at every 32nd step up to 0.28, and at
every 16th since (``dp_sync_interval``)."""
WAIT_S = 0.3e-3
"""Interval between two reads of the words. Ranks leave a step together, so few reads are needed."""
LONG_WAIT_S = 1e-3
"""The same interval after `LOOKS_UNTIL_LONG` reads: the others sleep, and START is in flight."""
LOOKS_UNTIL_LONG = 32

_SLOT_BYTES = 64  # a cache line: no two ranks write to the same one
_SLOT_WORDS = _SLOT_BYTES // 8
_WORK_BIT = 1
_DURATION_SHIFT, _DURATION_BITS = 1, 30
_ROUND_SHIFT = _DURATION_SHIFT + _DURATION_BITS  # 32 bits of round above: over a year of 8 ms steps
_MAX_DURATION_US = (1 << _DURATION_BITS) - 1


class Agreement(NamedTuple):
    """The values that all ranks share once the last one has entered a round.

    Attributes:
        seconds: duration of the step: the longest that a rank asked for.
        all_idle: true only in a round of agreement in which no rank has work.
    """

    seconds: float
    all_idle: bool


def create_memory(num_ranks: int) -> int:
    """Creates the shared words; returns an inheritable descriptor, which the caller closes."""
    fd = os.memfd_create("dpshm-lockstep", 0)
    os.ftruncate(fd, _size(num_ranks))
    return fd


class Lockstep:
    """One rank's side of the lockstep.

    Args:
        fd: the descriptor that `create_memory` returned.
        rank: its number, from 0.
        num_ranks: the number of ranks.
    """

    def __init__(self, fd: int, rank: int, num_ranks: int) -> None:
        if not 0 <= rank < num_ranks:
            raise SettingError(f"rank {rank} of {num_ranks} ranks: number them from 0 to {num_ranks - 1}")
        if os.fstat(fd).st_size != _size(num_ranks):
            raise SettingError(f"descriptor {fd} does not hold the words of {num_ranks} ranks")
        self.round = 0
        self._map = mmap.mmap(fd, _size(num_ranks))
        words = memoryview(self._map).cast("q")
        half = num_ranks * _SLOT_WORDS
        # One strided view a parity, so that one tolist() reads the words of all ranks.
        self._slots = (words[:half:_SLOT_WORDS], words[half::_SLOT_WORDS])
        self._rank = rank

    def enter(self, *, has_work: bool, seconds: float, interrupted: Callable[[], bool]) -> Agreement | None:
        """Enters the next round and waits for all other ranks.

        Args:
            has_work: whether this rank has requests.
            seconds: duration of its own step.
            interrupted: called while it waits; true ends the wait.

        Returns:
            The agreement; None if the wait was interrupted. This rank can then enter no more rounds.
        """
        self.round += 1
        slots = self._slots[self.round & 1]
        duration_us = min(max(round(seconds * 1e6), 0), _MAX_DURATION_US)
        # SYNC: one aligned 64-bit store through a cast memoryview (never struct.pack_into, which writes
        # zeros first), so the others' tolist() below reads all of it or none. Nothing else is handed over
        # with it, so no order between words is needed.
        slots[self._rank] = self.round << _ROUND_SHIFT | duration_us << _DURATION_SHIFT | has_work
        looks = 0
        # SYNC: tolist() loads each word whole, partner of the store above. The smallest word has the
        # smallest round, and no round here is later than ours.
        while min(words := slots.tolist()) >> _ROUND_SHIFT != self.round:
            if interrupted():
                return None
            time.sleep(WAIT_S if looks < LOOKS_UNTIL_LONG else LONG_WAIT_S)
            looks += 1
        longest_us = max(word >> _DURATION_SHIFT & _MAX_DURATION_US for word in words)
        idle = self.round % AGREEMENT_INTERVAL == 0 and not any(word & _WORK_BIT for word in words)
        return Agreement(longest_us / 1e6, idle)

    def close(self) -> None:
        """Unmaps the memory."""
        for view in self._slots:
            view.release()
        self._map.close()


def _size(num_ranks: int) -> int:
    return 2 * num_ranks * _SLOT_BYTES
