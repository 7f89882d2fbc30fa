"""Changes the number of a group's ranks, through its coordinator, which alone may."""

from __future__ import annotations

import time

from dpshm.board.board import Board
from dpshm.errors import SettingError
from dpshm.net import wire
from dpshm.net.keys import Folder
from dpshm.ops import drain
from dpshm.ops.drain import NotHeeded, ask, not_heeded


def set_size(board: Board, dp_size: int, *, curve_dir: Folder | None = None) -> None:
    """Changes the number of ranks. Returns once the board shows it.

    Args:
        board: the group's board; it may be read-only.
        dp_size: the new number of ranks.
        curve_dir: folder of the group's keys, where its sockets ask for them; default: the environment's.

    Raises:
        SettingError: the board has no room for so many.
        NotHeeded: no coordinator lives, or it did not change the number in time.
    """
    if not 1 <= dp_size <= board.engines:
        raise SettingError(
            f"cannot scale group {board.segment.group!r} to {dp_size} ranks: its board holds 1 to {board.engines} "
            "(max_engines)"
        )
    deadline = time.monotonic() + drain.TIMEOUT_S
    while not _is_size(board, dp_size):
        if not board.coordinator_alive():
            raise NotHeeded(
                f"group {board.segment.group!r} has no coordinator, which alone may scale it: start one with "
                f"dpshm coordinator --group {board.segment.group}"
            )
        if time.monotonic() > deadline:
            raise not_heeded(board, f"scale it to {dp_size} ranks")
        ask(board, [wire.encode_scale(dp_size)], lambda: _is_size(board, dp_size), curve_dir)


def _is_size(board: Board, dp_size: int) -> bool:
    board.segment.refresh()
    return board.dp_size == dp_size
