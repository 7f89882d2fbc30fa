"""Changes the number of a group's ranks, through its coordinator, which alone may.

Ranks in lockstep are scaled at rest (`dpshm.coordinator.scaling`); `set_size_at_rest` brings them there.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from dpshm.board.board import Board
from dpshm.board.words import DRAINED
from dpshm.coordinator.scaling import at_work, check_rest, check_size
from dpshm.linux.waits import seconds
from dpshm.net import wire
from dpshm.net.keys import Folder
from dpshm.ops import drain
from dpshm.ops.drain import NotHeeded, ask, not_heeded, set_drained

LOOK_S = 0.05
PROGRESS_S = 2.0
QUIET_S = 0.2
"""How long drained ranks have to stay at rest: a front-end may have chosen a rank an instant before its drain."""


def set_size(board: Board, dp_size: int, *, force: bool = False, curve_dir: Folder | None = None) -> None:
    """Changes the number of ranks. Returns once the board shows it.

    Args:
        board: the group's board; it may be read-only.
        dp_size: the new number of ranks.
        force: ranks in lockstep need not be at rest: they form a new collective while they run.
        curve_dir: folder of the group's keys, where its sockets ask for them; default: the environment's.

    Raises:
        SettingError: the board has no room for so many, or ranks in lockstep are not at rest.
        NotHeeded: no coordinator lives, or it did not change the number in time.
    """
    check_size(board, dp_size)
    deadline = time.monotonic() + drain.TIMEOUT_S
    while not _is_size(board, dp_size):
        if not board.coordinator_alive():
            raise NotHeeded(
                f"group {board.segment.group!r} has no coordinator, which alone may scale it: start one with "
                f"dpshm coordinator --group {board.segment.group}"
            )
        if not force:
            check_rest(board)
        if time.monotonic() > deadline:
            raise not_heeded(board, f"scale it to {dp_size} ranks")
        ask(board, [wire.encode_scale(dp_size)], lambda: _is_size(board, dp_size), curve_dir)
    board.wait_for_coordinator(lambda: True)  # the revision counts it, too


def set_size_at_rest(
    board: Board,
    dp_size: int,
    *,
    timeout_s: float | None = None,
    tell: Callable[[str], None] = lambda _: None,
    curve_dir: Folder | None = None,
) -> None:
    """Changes the number of ranks in lockstep: drains all, waits until they are at rest, and leaves them drained.

    If it does not come to that, also if a signal handler raises, the ranks that it drained are routed to again.

    Args:
        board: the group's board; it may be read-only.
        dp_size: the new number of ranks.
        timeout_s: how long to wait for the rest; None: for ever.
        tell: hears every 2 s what the ranks still do.
        curve_dir: folder of the group's keys, where its sockets ask for them; default: the environment's.

    Raises:
        SettingError: the board has no room for so many.
        NotHeeded: the ranks were not at rest in time, or the coordinator did not do its part.
    """
    check_size(board, dp_size)
    limit_s = None if timeout_s is None else seconds(timeout_s)
    board.segment.refresh()
    drained = [e for e in range(board.dp_size) if not board.engine_mark[e] & DRAINED]
    try:
        set_drained(board, drained, True, curve_dir=curve_dir)
        _wait_for_rest(board, limit_s, tell)
        set_size(board, dp_size, curve_dir=curve_dir)
    except BaseException:
        set_drained(board, drained, False, curve_dir=curve_dir)
        raise


def _wait_for_rest(board: Board, timeout_s: float | None, tell: Callable[[str], None]) -> None:
    began = quiet_since = time.monotonic()
    next_tell = began + PROGRESS_S
    while (now := time.monotonic()) < quiet_since + QUIET_S:
        board.segment.refresh()
        if doing := at_work(board):
            quiet_since = now
            if timeout_s is not None and now - began >= timeout_s:
                raise NotHeeded(
                    f"the ranks of group {board.segment.group!r} were not at rest after {timeout_s:g} s: {doing}. "
                    "Nothing was changed, and they are routed to again. Wait longer, or look at them: dpshm top"
                )
            if now >= next_tell:
                next_tell = now + PROGRESS_S
                tell(doing)
        time.sleep(LOOK_S)


def _is_size(board: Board, dp_size: int) -> bool:
    board.segment.refresh()
    return board.dp_size == dp_size
