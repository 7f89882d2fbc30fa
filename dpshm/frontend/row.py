"""How a front-end takes a row of the board: which one, and what it stores there before it is seen.

A front-end that starts copies ``received`` into ``sent``: what its predecessor booked is settled. Messages that a
predecessor still has on their way would be counted by engines as if this one had sent them, so rows whose last
holder has none are taken first.
"""

from __future__ import annotations

import os
import time

import numpy as np

from dpshm.board import layout
from dpshm.board.board import Board
from dpshm.board.words import COUNT_MASK
from dpshm.errors import CapacityExceeded, RowInUse
from dpshm.linux import processes
from dpshm.version import version_word


def take_row(board: Board, owner: bytes) -> int:
    """Locks and initialises a row.

    First choice is a row of the same owner, then the lowest free one; in either case one whose last holder has
    nothing on its way any more, if there is such a row. Low rows are best: readers look at all up to the highest.

    Raises:
        CapacityExceeded: every row is taken.
    """
    used = board.frontends_used()
    padded = owner.ljust(layout.OWNER_BYTES, b"\0")
    same = [f for f in range(used) if board.owner[f].tobytes() == padded]
    rest = [f for f in range(board.frontends) if f not in same]
    for anything in (False, True):
        for f in [*same, *rest]:
            if (anything or _is_settled(board, f)) and board.lock_frontend(f):
                _initialise(board, f, padded)
                return f
    raise CapacityExceeded(
        f"all {board.frontends} front-end rows of group {board.segment.group!r} are taken: start its "
        "coordinator with a larger max_frontends"
    )


def _is_settled(board: Board, f: int) -> bool:
    """Whether nothing that this row's holders sent can still be on its way to a live engine."""
    behind = np.flatnonzero(board.sent_requests[f] > board.received_requests[:, f])
    return not any(board.engine_alive(int(e)) for e in behind)


def _initialise(board: Board, f: int, owner: bytes) -> None:
    words = board.words
    if not board.segment.linked:
        raise RowInUse(f"group {board.segment.group!r} ended while this front-end attached; try again")
    for e in range(board.engines):
        words[board.index("sent_tokens", f, e)] = words[board.index("received_tokens", e, f)] & COUNT_MASK
        words[board.index("sent_requests", f, e)] = words[board.index("received_requests", e, f)] & COUNT_MASK
    for i in range(len(owner) // layout.WORD_BYTES):
        part = owner[i * layout.WORD_BYTES : (i + 1) * layout.WORD_BYTES]
        words[board.index("owner", f, i)] = int.from_bytes(part, "little", signed=True)
    pid = os.getpid()
    words[board.index("frontend_pid", f)] = pid
    words[board.index("frontend_start_time", f)] = processes.start_time(pid)
    words[board.index("frontend_pid_namespace", f)] = processes.namespace_inode("pid")
    words[board.index("frontend_version", f)] = version_word()
    words[board.index("frontend_beat", f)] = time.monotonic_ns()
    # SYNC: publication. The incarnation is stored last; whoever reads a new one reads this owner and pid.
    # (On Arm a reader may see it first; it then looks again on its next round, as the watcher does.)
    at = board.index("frontend_incarnation", f)
    words[at] = (words[at] & COUNT_MASK) + 1
