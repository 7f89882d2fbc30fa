"""What is outstanding at each rank: requests sent and not ended, prompt tokens sent and not computed.

Every request that is in flight, waiting or running was sent by some front-end and has not ended yet, and nothing
else is. So load is a sum of counts that only their own writers touch (rule 3 of dpshm/README.md):

    requests = offset + sum of sent requests over front-ends    offset = waiting + running - received
    tokens   = offset + sum of sent tokens over front-ends      offset = prefill backlog - received tokens

An engine keeps each offset as one word. When it receives a request, the request moves from *in flight* to
*waiting* and neither word changes, so the request never counts twice and never counts zero times, whatever the
order of the engine's other stores. The offsets stand right before the rows of what front-ends sent, so a decision
sums one table, a row for each front-end, and not a word for each pair.

A correction is computed when an `Outstanding` is made. It removes what a front-end that died or left had in
flight, and it allows for an engine that received more from a row than the row's present holder sent (late
messages of a predecessor). Both are rare. A front-end makes a new `Outstanding` when the board's marks change, and
ten times a second, so the sum is right again within 100 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.int64]

_REDUCE_FROM = 32
"""Columns from which on numpy's sum over rows is faster than a product with ones."""


class Outstanding:
    """Counts one of the two, over columns of the board that it reads anew each time.

    Args:
        table: the engines' offsets, and then what each front-end sent; shape (1 + front-ends, engines).
        received: what each engine received, shape (engines, front-ends).
        counted: the front-ends whose bookings count.
    """

    def __init__(self, table: Words, received: Words, counted: Sequence[int]) -> None:
        self._table = table
        self._ones = np.ones(len(table), np.int64) if table.shape[1] < _REDUCE_FROM else None
        # SYNC: received before sent, so that a live pair never looks as if more had been received than sent. (On
        # Arm it may, for one that is being stored at this instant; the next correction is right.)
        surplus = np.positive(received).T
        surplus = surplus - np.positive(table[1:])
        live = [f for f in counted if f < len(surplus)]  # they were counted before: rule 6
        surplus[live] = np.maximum(surplus[live], 0)
        correction = surplus.sum(axis=0)
        self._correction = correction if correction.any() else None

    def count(self) -> Words:
        """By rank; the array is the caller's. A scribbled board gives numbers without meaning, and no error."""
        # SYNC: each call below loads every word once, in one 64-bit access, and of each rank the offset first:
        # what ends in between counts once too often, and nothing is missed. Were it loaded last (on Arm loads may
        # change places), a request that is booked, run and ended in between would hide another; a request does not
        # run within the nanoseconds of one call.
        total: Words = np.add.reduce(self._table, 0) if self._ones is None else self._ones.dot(self._table)
        if self._correction is not None:
            total += self._correction
        return total
