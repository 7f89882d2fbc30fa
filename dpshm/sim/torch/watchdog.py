"""The watchdog of a rank that computes: ends a process whose step can never end, and says why.

A collective waits for all ranks. If a rank is gone or stuck, the others may wait for ever, in a library or on a
GPU, where no Python signal handler runs. The watchdog's thread checks every `LOOK_S`:

- the parent is gone: this process ends;
- another rank's process is gone and the step has not ended since: it can never end, so this process ends too, as
  in a crash. Its row then reads dead, and routing stops using the group;
- the step lasts longer than its limit: the stacks of all threads go to stderr, and the process ends.
"""

from __future__ import annotations

import faulthandler
import os
import select
import sys
import threading
import time

from dpshm.board.board import Board
from dpshm.linux.processes import parent_pidfd

LOOK_S = 0.05
PEER_GONE_GRACE_S = 0.5
"""Grace time after a loss, in which the step or the parent's order to end may still come."""
EXIT_PEER_GONE = 3
EXIT_STUCK = 4


class Watchdog(threading.Thread):
    """Watches one rank; the engine says when its steps begin and end.

    Args:
        board: the group's board.
        dp_rank: the rank that it watches.
        dp_size: the number of ranks.
        parent_pid: the parent; when it ends, this process ends.
        step_limit_s: the longest step in seconds.
    """

    def __init__(self, board: Board, dp_rank: int, dp_size: int, parent_pid: int, step_limit_s: float) -> None:
        super().__init__(name="dpshm-watchdog", daemon=True)
        self._board = board
        self._dp_rank = dp_rank
        self._others = [rank for rank in range(dp_size) if rank != dp_rank]
        self._parent = select.poll()
        self._parent.register(parent_pidfd(parent_pid), select.POLLIN)
        self._step_limit_s = step_limit_s
        self._began_s = 0.0
        self._stop_asked = False

    def step_began(self) -> None:
        """Marks the beginning of a step."""
        self._began_s = time.monotonic()

    def step_ended(self) -> None:
        """Marks the end of the step."""
        self._began_s = 0.0

    def stop(self) -> None:
        """Ends the thread. Call it before the board is closed."""
        self._stop_asked = True
        self.join()

    def run(self) -> None:
        """The thread."""
        gone_since_s = gone_in_step_s = 0.0
        while not self._stop_asked:
            time.sleep(LOOK_S)
            if self._parent.poll(0):
                os._exit(1)
            began_s = self._began_s
            if not began_s:
                continue
            now_s = time.monotonic()
            gone = [rank for rank in self._others if not self._board.engine_alive(rank)]
            if not gone or began_s != gone_in_step_s:
                gone_since_s, gone_in_step_s = now_s, began_s
            elif now_s - gone_since_s > PEER_GONE_GRACE_S:
                self._end(EXIT_PEER_GONE, f"rank(s) {gone} are gone and its step cannot end")
            if now_s - began_s > self._step_limit_s:
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                self._end(EXIT_STUCK, f"its step has lasted over {self._step_limit_s:g} s; its stacks are above")

    def _end(self, status: int, why: str) -> None:
        sys.stderr.write(f"engine {self._dp_rank} ends: {why}. Restart all ranks of the group\n")
        sys.stderr.flush()
        os._exit(status)
