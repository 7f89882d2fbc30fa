"""Many light processes for the tests that kill them by the dozen.

A `tests.support.Remote` forks them, so each costs a fork and not a start, and they die with it. The functions at
the end are their programs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from dpshm.engine.row import EngineRow
from tests.support import Remote

KV_ONE = (1 << 16) - 1
PR_SET_PDEATHSIG = 1  # prctl(2)


class Nursery:
    """A process that has children.

    Attributes:
        pids: of the present ones.
    """

    def __init__(self) -> None:
        self._remote = Remote()
        self._remote.run("from tests.fault import nursery")
        self.pids: list[int] = []

    def rear(self, function: str, arguments: Iterable[tuple[Any, ...]]) -> list[int]:
        """Forks a child for each tuple of arguments; it calls a function of this module, and ends after that."""
        call = f"nursery.fork_all(nursery.{function}, arguments)"
        new: list[int] = self._remote.eval(call, arguments=list(arguments))
        self.pids += new
        return new

    def reap(self) -> list[int]:
        """Waits for all to end; minus the signal, or the exit status, of each."""
        statuses: list[int] = self._remote.eval(
            "[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]", pids=self.pids
        )
        self.pids = []
        return statuses

    def close(self) -> None:
        """Ends it, and them."""
        self._remote.close()


def fork_all(function: Callable[..., None], arguments: list[tuple[Any, ...]]) -> list[int]:
    """Called in the nursery's process."""
    pids = []
    for each in arguments:
        if (pid := os.fork()) == 0:
            try:
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                function(*each)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    return pids


def write_forever(group: str, dp_rank: int) -> None:
    """An engine whose every word follows from one counter: see `tests.fault.test_board_stress`."""
    engine = EngineRow.attach(group, dp_rank)
    counter = 0
    while True:
        counter += 1
        with engine.step(prefill_tokens=3, batch=2):
            engine.count_received(dp_rank, prompt_tokens=7)
        engine.finished()
        engine.publish(
            waiting=counter,
            running=2 * counter,
            prefill_backlog=3 * counter,
            kv_cache_usage=counter % KV_ONE / KV_ONE,
            step=counter,
        )
