"""Exclusive decisions: read, decide and book under one kernel lock of the group.

Without the lock two front-ends that decide within the same few microseconds may read the same board and choose the
same engine, because neither has seen the other's booking. With it they decide one after the other. The lock is an
open-file-description lock on one byte of the lock file, so the kernel releases it when its holder ends, in any
way. It binds only front-ends that ask for it.

A holder may be stopped (SIGSTOP, a debugger, a busy host) and must not stop the others: if the lock is not granted
within `TIMEOUT_NS`, a front-end decides without it, as it would with the mode off, and counts that.
"""

from __future__ import annotations

import fcntl
import time

from dpshm.board.locks import lock_request, try_lock, unlock
from dpshm.board.segment import Segment

BYTE = 0
"""In the header, which has no row's lock."""
TIMEOUT_NS = 5_000_000
SPINS = 100
"""Tries with a mere yield between them: a decision takes some microseconds. After that it sleeps in between."""
SLEEP_S = 50e-6


_LOCK, _UNLOCK = lock_request(fcntl.F_WRLCK, BYTE, 1), lock_request(fcntl.F_UNLCK, BYTE, 1)


class DecisionLock:
    """The lock as one front-end sees it.

    Attributes:
        missed: how many decisions were made without the lock, because its holder did not move.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self.missed = 0

    def enter(self) -> bool:
        """Waits for the lock, not for long; whether it was given."""
        fd, tries, deadline_ns = self._segment.locks.fd, 0, 0
        while True:
            if try_lock(fd, _LOCK):
                return True
            tries += 1
            now_ns = time.monotonic_ns()
            deadline_ns = deadline_ns or now_ns + TIMEOUT_NS
            if now_ns > deadline_ns:
                self.missed += 1
                return False
            time.sleep(0 if tries < SPINS else SLEEP_S)

    def leave(self) -> None:
        """Gives the lock back."""
        unlock(self._segment.locks.fd, _UNLOCK)
