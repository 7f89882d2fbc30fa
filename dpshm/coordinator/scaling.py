"""Whether the number of a group's ranks may be changed now.

Ranks in lockstep step inside collectives of a fixed number of ranks. A rank that is added, or taken away, while
the others step would let them wait for ever. So such a group is scaled at rest: every rank that lives is drained,
none has a request, and the wave is paused. Ranks of their own (dense models) can be added at any time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpshm.board.words import DRAINED, VERDICT_MASK
from dpshm.errors import SettingError
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import Phase

if TYPE_CHECKING:
    from dpshm.board.board import Board

_GONE = (Verdict.ABSENT, Verdict.DEAD)


def living_ranks(board: Board) -> list[int]:
    """The ranks that have a process, as far as their marks say."""
    marks = board.engine_mark[: board.dp_size].tolist()
    return [e for e, mark in enumerate(marks) if mark & VERDICT_MASK not in _GONE]


def at_work(board: Board) -> str:
    """What a group in lockstep still does, in words; empty if it is paused and no living rank has a request."""
    living = living_ranks(board)
    requests = board.snapshot()["requests"].tolist()
    busy = [f"rank {e} has {requests[e]} request{'s' * (requests[e] != 1)}" for e in living if requests[e]]
    if busy:
        return ", ".join(busy)
    if living and board.phase is not Phase.PAUSED:
        return f"wave {board.wave} is {board.phase.name.lower()}"
    return ""


def check_size(board: Board, dp_size: int) -> None:
    """Refuses a number of ranks for which the board has no room.

    Raises:
        SettingError: it has none.
    """
    if not 1 <= dp_size <= board.engines:
        raise SettingError(
            f"cannot scale group {board.segment.group!r} to {dp_size} ranks: its board holds 1 to {board.engines} "
            "(max_engines)"
        )


def check_rest(board: Board) -> None:
    """Refuses to scale ranks in lockstep that are not at rest.

    Raises:
        SettingError: a living rank is not drained, has requests, or the wave is not paused.
    """
    if not board.segment.header.waves:
        return
    open_ranks = [e for e in living_ranks(board) if not board.engine_mark[e] & DRAINED]
    found = f"ranks {open_ranks} are not drained" if open_ranks else at_work(board)
    if found:
        group = board.segment.group
        raise SettingError(
            f"cannot scale group {group!r} now: its ranks run in lockstep, in collectives of {board.dp_size}, and "
            f"{found}. Drain all ranks, wait until they have no request and the wave is paused, scale, restart "
            f"all, undrain all: `dpshm scale N --group {group}` does the first three. If your ranks form a new "
            "collective while they run, say force (--force)"
        )
