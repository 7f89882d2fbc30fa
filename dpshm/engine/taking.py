"""How a process takes a rank's row: it waits for the rank, locks the row, and begins it.

A new holder zeroes the row and copies each front-end's ``sent`` into ``received``: requests of the previous
holder, and those in flight to it, no longer count.
"""

from __future__ import annotations

import os
import time

from dpshm.board import layout
from dpshm.board.board import Board
from dpshm.board.words import COUNT_MASK
from dpshm.errors import RowInUse, SettingError
from dpshm.linux import processes
from dpshm.version import version_word

ROW_TIMEOUT_S = 0.05
"""A coordinator that scales holds a row for an instant, and the kernel a dead process's locks for some more."""
EXIT_TIMEOUT_S = 60.0
"""For how long a successor waits for the kernel to free the memory of a row's last process, and then its lock."""
WAIT_S = 0.01


def wait_for_rank(board: Board, dp_rank: int, deadline: float) -> None:
    """Waits until the group has that rank, or ended.

    Args:
        board: the group's.
        dp_rank: the rank.
        deadline: of ``time.monotonic()``.

    Raises:
        SettingError: the group has fewer ranks at the deadline.
    """
    while dp_rank >= board.dp_size and board.segment.linked:
        if time.monotonic() >= deadline:
            group = board.segment.group
            raise SettingError(
                f"group {group!r} has {board.dp_size} ranks, 0 to {board.dp_size - 1}, and no rank {dp_rank}. If "
                f"the number is right, scale the group first (dpshm scale {dp_rank + 1} --group {group}, or "
                "Coordinator.scale), or let attach wait for that with timeout_s"
            )
        time.sleep(WAIT_S)
        board.segment.refresh()


def lock(board: Board, dp_rank: int) -> None:
    """Locks a row. Waits while the kernel ends the row's last process.

    Raises:
        RowInUse: a live process has that rank, or one that has been ending for `EXIT_TIMEOUT_S`.
    """
    began, pause_s = time.monotonic(), 0.002
    while not board.lock_engine(dp_rank):
        waited_s = time.monotonic() - began
        group, pid = board.segment.group, int(board.engine_pid[dp_rank])
        if waited_s > ROW_TIMEOUT_S and not board.engine_ends(dp_rank):
            # Asked again: it may have ended between the two questions.
            if board.lock_engine(dp_rank):
                return
            raise RowInUse(f"rank {dp_rank} of group {group!r} is taken by the live process {pid}")
        if waited_s > EXIT_TIMEOUT_S:
            raise RowInUse(
                f"rank {dp_rank} of group {group!r} is not free: the kernel has been ending its last process "
                f"({pid}) for {EXIT_TIMEOUT_S:g} s, and still frees its memory. Try again"
            )
        pause_s = min(2 * pause_s, 0.05)
        time.sleep(pause_s)


def initialise(board: Board, dp_rank: int) -> None:
    """Begins a row: of this process, with nothing received and nothing outstanding."""
    words = board.words
    incarnation = words[board.index("engine_incarnation", dp_rank)] & COUNT_MASK
    # No process first: a reader must not take these counters, which fall, for those of the previous holder.
    words[board.index("engine_pid", dp_rank)] = 0
    for name in ("load", "preemptions", *layout.ENGINE_WORDS):
        if name != "engine_incarnation":
            words[board.index(name, dp_rank)] = 0
    for name, items in (("step_model", layout.STEP_MODEL_WORDS), ("cache_state", layout.CACHE_WORDS)):
        for i in range(len(items)):
            words[board.index(name, dp_rank, i)] = 0
    for f in range(board.frontends):
        words[board.index("received_tokens", dp_rank, f)] = (
            words[board.index("sent_tokens", f, dp_rank)] & COUNT_MASK
        )
        words[board.index("received_requests", dp_rank, f)] = (
            words[board.index("sent_requests", f, dp_rank)] & COUNT_MASK
        )
    board.nothing_outstanding(dp_rank)
    pid = os.getpid()
    words[board.index("engine_pid", dp_rank)] = pid
    words[board.index("engine_start_time", dp_rank)] = processes.start_time(pid)
    words[board.index("engine_pid_namespace", dp_rank)] = processes.namespace_inode("pid")
    words[board.index("engine_time_namespace", dp_rank)] = processes.namespace_inode("time")
    words[board.index("engine_version", dp_rank)] = version_word()
    words[board.index("beat", dp_rank)] = time.monotonic_ns()
    # SYNC: publication: the incarnation last, so that the watcher, who judges a row once it sees a new one,
    # reads this pid. (On Arm it may see it first; its next round reads the pid again.)
    words[board.index("engine_incarnation", dp_rank)] = incarnation + 1
