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

Where front-ends of other nodes have rows, a request may be here before the relay has brought its booking, with
every request. `LiveOutstanding` makes the correction anew in each sum, so that such a request counts from when
either of the two is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
        self.correction: Words = surplus.sum(axis=0)
        self._correction = self.correction if self.correction.any() else None

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


class LiveOutstanding:
    """The same for a board on which front-ends of other nodes have rows: no correction is ever old.

    Of a front-end that counts, what was sent is at least what was received. Of another one it is just that.
    """

    def __init__(self, table: Words, received: Words, counted: Sequence[int]) -> None:
        self._table, self._received = table, received
        counts = np.zeros(len(table) - 1, np.bool_)
        counts[[f for f in counted if f < len(counts)]] = True
        self._counted = None if counts.all() else counts[:, None]

    def count(self) -> Words:
        """By rank; the array is the caller's. A scribbled board gives numbers without meaning, and no error."""
        # SYNC: each of three calls loads every word once, in one 64-bit access: of each rank the offset, then what
        # was received, then what was sent. An engine, and the relay in its place, stores `received` before the
        # offset that has it in the queue. So a request that the offset shows is received here, and one that is
        # received and not in the offset yet is in this sum. What ends in between counts once too often. (On Arm a
        # load may pass another, and one request be missed or counted twice for an instant.)
        total: Words = np.positive(self._table[0])
        received = np.positive(self._received).T
        sent = np.maximum(self._table[1:], received)
        if self._counted is not None:
            sent = np.where(self._counted, sent, received)
        total += np.add.reduce(sent, 0)
        return total


class OutstandingWork:
    """Requests and tokens in one call: what a decision by work reads.

    Args:
        tables: both tables, shape (2, 1 + front-ends, engines): those of requests, then those of tokens.
        requests, tokens: counters of the two, made a moment ago.

    Attributes:
        requests: that counter.
    """

    def __init__(
        self, tables: Words, requests: Outstanding | LiveOutstanding, tokens: Outstanding | LiveOutstanding
    ) -> None:
        self._tables, self._each, self.requests = tables, (requests, tokens), requests
        self._ones = np.ones(tables.shape[1], np.int64) if tables.shape[2] < _REDUCE_FROM else None
        self._live = not (isinstance(requests, Outstanding) and isinstance(tokens, Outstanding))
        corrections = [counter.correction for counter in self._each if isinstance(counter, Outstanding)]
        self._corrections = np.array(corrections) if any(c.any() for c in corrections) else None

    def count(self) -> Words:
        """By rank, of shape (2, engines): requests, tokens. The array is the caller's."""
        # SYNC: as `Outstanding.count`: every word is loaded once, and of each rank the offset first. Between
        # requests and tokens there is no order: front-ends book the one after the other.
        if self._live:
            total: Words = np.array([counter.count() for counter in self._each])
        elif self._ones is None:
            total = np.add.reduce(self._tables, 1)
        else:
            total = self._ones.dot(self._tables)
        return total if self._corrections is None else total + self._corrections

    def count_into(self, out: Words) -> None:
        """The same, into an array of this shape."""
        out[:] = self.count()

    def counter(self) -> Callable[[], Words]:
        """`count` as one call, while this object is used."""
        if self._live or self._corrections is not None or self._ones is None:
            return self.count
        return partial(self._ones.dot, self._tables)  # SYNC: as in `count`

    def counter_into(self, out: Words) -> Callable[[], object]:
        """The same for `count_into`, with that array."""
        if self._live or self._corrections is not None or self._ones is not None:
            return partial(self.count_into, out)
        return partial(np.add.reduce, self._tables, 1, None, out)  # SYNC: as in `count`
