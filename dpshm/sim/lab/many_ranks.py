"""The board's numbers of many ranks as arrays, as a front-end of such a group has them.

Rows are Python objects here, and few of hundreds change between two decisions: their words are kept, and those of
rows that changed are replaced. Step models are worked out again every `REFRESH_S`, as in `dpshm.frontend`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dpshm.board.layout import STEP_WORDS
from dpshm.board.words import queued
from dpshm.policies.columns import ArrayRows, ArrayWork
from dpshm.policies.prepared import PreparedArrays, prepare_arrays
from dpshm.sim.lab.rank import Row

REFRESH_S = 0.1
STEPS = len(STEP_WORDS)


class ManyRanks:
    """What was shown last of so many ranks.

    Args:
        ranks: how many.
        compared: the models by which decisions compare ranks (`dpshm.policies.comparable`), of these rows.
    """

    def __init__(self, ranks: int, compared: Callable[[Sequence[Row], float], list[list[int]]]) -> None:
        self._compared = compared
        self._rows: list[Row | None] = [None] * ranks
        self._words = np.zeros((2 + STEPS, ranks), np.int64)
        self._refresh_s = 0.0
        self._models = self._words
        self._prepared: PreparedArrays | None = None

    def look(
        self, rows: Sequence[Row], in_flight: NDArray[np.int64], now_s: float, *, lockstep: bool
    ) -> tuple[NDArray[np.int64], ArrayWork]:
        """The ranks' loads and work.

        Args:
            rows: by rank.
            in_flight: requests and tokens, of shape (2, ranks).
            now_s: the time of the decision.
            lockstep: whether the ranks step together.
        """
        if self._prepared is None or now_s >= self._refresh_s:
            self._refresh_s = now_s + REFRESH_S
            self._models = np.array(self._compared(rows, now_s), np.int64)
            self._prepared = prepare_arrays(self._models)
        words, shown = self._words, self._rows
        for e, row in enumerate(rows):
            if row is not shown[e]:
                shown[e], words[:, e] = row, (row.load, row.backlog, *row.model[:STEPS])
        load = words[0].copy()
        found = ArrayRows(len(rows))
        found.requests[:], found.tokens[:], found.steps[:] = queued(load), words[1], words[2:]
        found.counts += in_flight
        return load, ArrayWork(found, self._models, int(now_s * 1e9), lockstep, self._prepared)
