"""The ranks that a front-end's owner has a live connection to, and the word of them to the coordinator.

vLLM's own engines report to the coordinator after a step alone. In a dense group a rank that has had no request
yet is therefore not known to be there, except to those that are connected to it.
"""

from __future__ import annotations

from dpshm.board.board import Board
from dpshm.board.words import ON_BEHALF, VERDICT_MASK
from dpshm.frontend.wakeup import Wakeup
from dpshm.rules.liveness import Verdict

SAY_AGAIN_NS = 1_000_000_000
"""Between two words to the coordinator that a rank was heard which the board does not show."""


class HeardRanks:
    """The ranks. Called under the front-end's lock, with CLOCK_MONOTONIC."""

    def __init__(self, board: Board, wakeup: Wakeup) -> None:
        self._board = board
        self._wakeup = wakeup
        self._heard: set[int] = set()
        self._next_word_ns = 0

    def add(self, dp_rank: int, now_ns: int) -> None:
        """There is a connection."""
        self._heard.add(dp_rank)
        self._tell(now_ns)

    def remove(self, dp_rank: int) -> None:
        """It has ended."""
        self._heard.discard(dp_rank)

    def remind(self, now_ns: int) -> None:
        """Says it again, if a second has passed."""
        if self._heard and now_ns >= self._next_word_ns:
            self._tell(now_ns)

    def _tell(self, now_ns: int) -> None:
        """Names the ranks that were heard and have no row of their own, if one of them is not there yet."""
        marks = self._board.engine_mark[: self._board.dp_size].tolist()
        absent = {e for e in self._heard if e < len(marks) and marks[e] & VERDICT_MASK == Verdict.ABSENT}
        if absent:
            self._next_word_ns = now_ns + SAY_AGAIN_NS
            stock = {e for e in self._heard if e < len(marks) and marks[e] & ON_BEHALF}
            self._wakeup.tell_heard(sorted(absent | stock))
