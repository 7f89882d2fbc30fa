"""What a view is made of: the board's numbers as they were read, as fast as they can be had.

`View` wraps one of the two forms and shows it to a user's policy under names. The built-in policies read the form
itself. Below `VECTOR_FROM` ranks it is `ListColumns`, because a loop over 8 engines is faster than a handful of
numpy calls; from there on it is `ArrayColumns`, of int64. Both hold the same facts: `load` is packed
(`dpshm.board.words.unpack_load`), and all but `ranks` is indexed by dp_rank and holds every rank of the group.

Nothing here is trusted: a scribbled board gives a bad choice, and no error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from dpshm.board.words import KV_ONE, WAITING_SHIFT
from dpshm.policies.prepared import Prepared, PreparedArrays

VECTOR_FROM = 16
"""Ranks from which on a view is made of arrays. The two forms cost the same at about this size."""
OVERLOADED_KV = round(0.95 * KV_ONE)
"""A rank with a queue and more of its KV cache in use than this (the low 16 bits of a load word, so 95 %) is
overloaded: what it admits next may push out what it runs."""

Words: TypeAlias = NDArray[np.int64]
_ZERO = np.array(0)


class ListWork(msgspec.Struct, eq=False, gc=False):
    """What the ranks have to compute and how fast they are; few ranks.

    Attributes:
        tokens: prompt tokens that any front-end sent and the engine has not computed.
        steps: a column for each of `dpshm.board.layout.STEP_WORDS`: the running step, and the held context.
        models: by rank the words of `dpshm.board.layout.MODEL_WORDS`: what the engine has learnt of its steps, as
            `dpshm.policies.comparable` gives them. They may be some tenths of a second old.
        now_ns: CLOCK_MONOTONIC.
        lockstep: whether the ranks step together, so that a step lasts as long as the slowest rank's.
        prepared: `dpshm.policies.prepared.prepare` of `models`, where it was made before.
    """

    tokens: list[int]
    steps: list[list[int]]
    models: list[list[int]]
    now_ns: int
    lockstep: bool = False
    prepared: Prepared | None = None


class ArrayRows:
    """The arrays of one decision over many ranks: rows of one matrix, which a policy may multiply as a whole.

    Attributes:
        steps: shape (3, ranks): `ends`, `step_tokens` and `held`, as `ListWork.steps`.
        counts: shape (2, ranks): `requests` and `tokens`.
        terms: shape (5, ranks): `held`, `requests`, `tokens`, and two rows that `subtract` fills.
    """

    __slots__ = (
        *("steps", "counts", "terms", "_left", "_now"),
        *("ends", "held", "requests", "rest", "step_tokens", "tokens", "unseen"),
    )

    def __init__(self, ranks: int) -> None:
        rows: Words = np.empty((7, ranks), np.int64)
        self.steps, self.counts, self.terms, self._left = rows[:3], rows[3:5], rows[2:], rows[5:]
        self.ends, self.step_tokens, self.held, self.requests, self.tokens, self.unseen, self.rest = rows
        self._now = np.array(0)

    def subtract(self, now_ns: int) -> None:
        """Fills `unseen`, prompt tokens that the running step leaves, and `rest`, ns that are left of it."""
        self._now.fill(now_ns)
        np.subtract(self.tokens, self.step_tokens, self.unseen)
        np.subtract(self.ends, self._now, self.rest)
        np.maximum(self._left, _ZERO, out=self._left)

    @classmethod
    def of(cls, requests: Sequence[int], tokens: Sequence[int], steps: Sequence[Sequence[int]]) -> ArrayRows:
        """Of these numbers, given as `ListColumns` and `ListWork` have them."""
        rows = cls(len(requests))
        rows.requests[:], rows.tokens[:], rows.steps[:] = requests, tokens, steps
        return rows


class ArrayWork(msgspec.Struct, eq=False, gc=False):
    """As `ListWork`, of many ranks; `models` has the shape (ranks, 7)."""

    rows: ArrayRows
    models: Words
    now_ns: int
    lockstep: bool = False
    prepared: PreparedArrays | None = None

    @property
    def tokens(self) -> Words:
        """As `ListWork.tokens`."""
        tokens: Words = self.rows.tokens
        return tokens

    @property
    def steps(self) -> Words:
        """As `ListWork.steps`."""
        return self.rows.steps


class ListColumns(msgspec.Struct, eq=False, gc=False):
    """The numbers of few ranks.

    Attributes:
        ranks: the ranks that may be chosen, never empty, in the order that breaks ties.
        load: reported load, packed.
        requests: those waiting, running, and sent by any front-end but not received.
        own: requests of this front-end that are unfinished.
        num_frontends: live front-ends.
        work: tokens and step times, if the policy asked for them.
        weights: speeds of the ranks relative to each other; None: they are equal.
        ages_ns: by rank, how old its row may be; None: all ranks are of this node.
    """

    ranks: list[int]
    load: list[int]
    requests: list[int]
    own: list[int]
    num_frontends: int
    work: ListWork | None = None
    weights: list[float] | None = None
    ages_ns: list[int] | None = None

    def free(self) -> list[int]:
        """The ranks that may be chosen and are not overloaded, in their order; if all are, all of them."""
        load = self.load
        return [r for r in self.ranks if not is_overloaded(load[r])] or self.ranks

    def least(self, scores: Sequence[float], times: float | None = None) -> int:
        """The first of the ranks that may be chosen whose score is least; an overloaded one only if all are.

        Args:
            scores: by rank.
            times: if each rank that is not overloaded scores more than so many times the least of all, an
                overloaded one is taken after all.
        """
        best = -1
        if len(self.ranks) == len(scores) and type(scores) is list:  # all ranks: without a call for each
            least = min(scores)
            if scores.count(least) == 1:
                best = scores.index(least)
        if best < 0:
            best = min(self.ranks, key=scores.__getitem__)
        # `is_overloaded`, written out. It is rare, so it comes last: the least of all is the least of the free.
        word = self.load[best]
        if word >> WAITING_SHIFT > 0 and word & KV_ONE > OVERLOADED_KV:
            free = min(self.free(), key=scores.__getitem__)
            if times is None or scores[free] <= times * scores[best]:
                best = free
        return best


class ArrayColumns(msgspec.Struct, eq=False, gc=False):
    """The numbers of many ranks, as int64 arrays; `own` is a list here too."""

    ranks: Words
    load: Words
    requests: Words
    own: list[int]
    num_frontends: int
    work: ArrayWork | None = None
    weights: NDArray[np.float64] | None = None
    ages_ns: list[int] | None = None

    def free(self) -> Words:
        """As `ListColumns.free`."""
        ranks = self.ranks
        words = self.load[ranks]
        free = ranks[(words >> WAITING_SHIFT <= 0) | (words & KV_ONE <= OVERLOADED_KV)]
        return free if len(free) else ranks

    def least(self, scores: NDArray[Any], times: float | None = None) -> int:
        """As `ListColumns.least`."""
        ranks = self.ranks
        best = ranks[scores[ranks].argmin()]
        word = self.load[best]
        if word >> WAITING_SHIFT > 0 and word & KV_ONE > OVERLOADED_KV:
            ranks = self.free()
            free = ranks[scores[ranks].argmin()]
            if times is None or scores[free] <= times * scores[best]:
                best = free
        return int(best)


Columns: TypeAlias = ListColumns | ArrayColumns


def is_overloaded(word: int) -> bool:
    """Whether a rank with this load word has a queue and hardly any KV cache left."""
    return word >> WAITING_SHIFT > 0 and word & KV_ONE > OVERLOADED_KV


def columns_of(few: ListColumns) -> Columns:
    """The form in which a front-end reads a group of this size: `few` itself, or the same as arrays."""
    if len(few.load) < VECTOR_FROM:
        return few
    ranks, load, requests = (np.array(row, np.int64) for row in (few.ranks, few.load, few.requests))
    work = None
    if few.work is not None:
        rows = ArrayRows.of(few.requests, few.work.tokens, few.work.steps)
        work = ArrayWork(rows, np.array(few.work.models, np.int64), few.work.now_ns, few.work.lockstep)
    weights = None if few.weights is None else np.array(few.weights)
    return ArrayColumns(ranks, load, requests, few.own, few.num_frontends, work, weights)
