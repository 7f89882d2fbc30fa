"""A reader of the soak: it reads the board and does nothing else. What it reads is possible at any time."""

from __future__ import annotations

import time
from collections.abc import Callable

from dpshm import Board
from dpshm.ops.read_frame import read_frame
from tests.soak.ledger import Ledger

READS = 50
"""So many reads, and then the board is opened anew."""


class SoakReader:
    """One reader's life. The wave and the epoch never fall."""

    def __init__(self, group: str, ledger: Ledger, slot: int, life: int) -> None:
        self._group, self._words = group, ledger.words
        self._at = {name: ledger.at(life, name) for name in ("quiet", "attempted", "unexpected")}
        self._highest = (0, 0)

    def run(self, told: Callable[[], bool]) -> None:
        """Reads until told to end."""
        self._words[self._at["quiet"]] = 1
        while not told():
            with Board.attach(self._group, readonly=True) as board:
                for _ in range(READS):
                    if told():
                        return
                    self._read(board)
                    time.sleep(0.01)

    def _read(self, board: Board) -> None:
        frame = read_frame(board)
        now = int(board.epoch[0]), board.wave
        fell = now[0] < self._highest[0] or now[1] < self._highest[1]
        self._highest = max(now[0], self._highest[0]), max(now[1], self._highest[1])
        states = set(board.snapshot()["verdict"].tolist())
        possible = states <= {"absent", "alive", "stalled", "stuck", "dead"}
        self._words[self._at["attempted"]] += 1
        self._words[self._at["unexpected"]] += fell or not possible or len(frame.ranks) != board.dp_size
