"""Verdicts: what the coordinator says of an engine or a front-end, as a pure function (rule 5) of what it saw.

- *dead*: the process is gone. Only its lock says so: a held lock always means alive, and a free lock under a row
  that a process took always means dead. (A pid may belong to another namespace, or be reused; a pidfd only tells
  *when* to test the lock.)
- *stalled*: alive, not paused by the user, has work, and its beat has not moved for ``stall_timeout``. The
  watcher measures that by its own clock, so it does not matter which clock the beat was taken from. The
  timeout has to exceed the longest step.
- *alive*: otherwise. *absent*: no process ever took the row, or its process left in good order.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Verdict(IntEnum):
    """The values are those stored in a mark; zeroed memory reads as absent."""

    ABSENT = 0
    ALIVE = 1
    STALLED = 2
    DEAD = 3


class Observation(NamedTuple):
    """What the watcher saw of one row.

    Attributes:
        taken: some process has stored its pid in the row and not taken it back.
        locked: the lock on its byte is held.
        has_work: it is in a step, has requests waiting, or has some on their way.
        paused: the user paused it.
        beat_age_ns: how long its beat has not moved, by the watcher's clock.
    """

    taken: bool
    locked: bool
    has_work: bool = False
    paused: bool = False
    beat_age_ns: int = 0


def judge(signs: Observation, stall_timeout_ns: int) -> Verdict:
    """The verdict on one row; `stall_timeout_ns` 0 means that nothing is ever called stalled."""
    if not signs.locked:
        return Verdict.DEAD if signs.taken else Verdict.ABSENT
    if not signs.taken:
        return Verdict.ABSENT  # between its lock and its first store
    stalled = 0 < stall_timeout_ns <= signs.beat_age_ns and signs.has_work and not signs.paused
    return Verdict.STALLED if stalled else Verdict.ALIVE
