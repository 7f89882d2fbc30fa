"""Whose a rank's row is, where rows come from other nodes: a process's of this node, or whose it was before."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpshm.board.board import Board

REPLACED_KEPT = 16
"""So many processes that had a rank, and boards that a node had, are remembered."""
LOCK_TEST_NS = 100_000_000
"""For so long a row that no process of this node held counts as free."""


class Holders:
    """Of all ranks of a board. For one thread at a time."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._lock_tested_ns: dict[int, int] = {}
        self._replaced: dict[int, deque[int]] = {}

    def is_free(self, e: int, now_ns: int) -> bool:
        """Whether no process of this node holds the row. Asked seldom: it is a system call."""
        tested_ns = self._lock_tested_ns.get(e)
        if tested_ns is not None and now_ns - tested_ns < LOCK_TEST_NS:
            return True
        if self._board.engine_alive(e):
            return False
        self._lock_tested_ns[e] = now_ns
        return True

    def replace(self, e: int, process: int) -> None:
        """Another process has the rank now; `process` had it before, or none had if it is 0."""
        if process:
            self._replaced.setdefault(e, deque(maxlen=REPLACED_KEPT)).append(process)

    def was_replaced(self, e: int, process: int) -> bool:
        """Whether that process had the rank before the present one."""
        return process in self._replaced.get(e, ())
