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

VECTOR_FROM = 32
"""Ranks from which on a view is made of arrays. The two forms cost the same at about this size."""
NO_LIMIT = 1 << 40
"""Tokens or requests, where a rank has met no limit."""
OVERLOADED_KV = round(0.95 * KV_ONE)
"""A rank with a queue and more of its KV cache in use than this (the low 16 bits of a load word, so 95 %) is
overloaded: what it admits next may push out what it runs."""

Words: TypeAlias = NDArray[np.int64]


class ListWork(msgspec.Struct, eq=False, gc=False):
    """What the ranks have to compute and how fast they are; few ranks.

    Attributes:
        tokens: prompt tokens that any front-end sent and the engine has not computed.
        steps: by rank the words of `dpshm.board.layout.STEP_WORDS`: the running step, and the held context.
        models: by rank the words of `dpshm.board.layout.MODEL_WORDS`: what the engine has learnt of its steps, as
            `dpshm.policies.comparable` gives them. They may be some tenths of a second old.
        now_ns: CLOCK_MONOTONIC.
        lockstep: whether the ranks step together, so that a step lasts as long as the slowest rank's.
    """

    tokens: list[int]
    steps: list[list[int]]
    models: list[list[int]]
    now_ns: int
    lockstep: bool = False


class PreparedModels(msgspec.Struct, eq=False, gc=False):
    """Models of many ranks, worked out once for many decisions: arrays by rank, and the least of two of them.

    Attributes:
        base_and_request: of a step with the new request alone.
        least_chunk, least_running: the least over the ranks.
        most_held: the most over the ranks of `per_held`.
    """

    base_and_request: Words
    per_request: Words
    per_token: Words
    chunk: Words
    chunk_less_one: Words
    running_less_one: Words
    ending: Words
    per_held: Words
    least_chunk: int
    least_running: int
    most_held: int


class ArrayWork(msgspec.Struct, eq=False, gc=False):
    """The same of many ranks: `tokens` of shape (ranks,), `steps` (ranks, 3), `models` (ranks, 7).

    `prepared` is `dpshm.policies.work.prepare` of `models`, where it was made before.
    """

    tokens: Words
    steps: Words
    models: Words
    now_ns: int
    prepared: PreparedModels | None = None
    lockstep: bool = False


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
    """

    ranks: list[int]
    load: list[int]
    requests: list[int]
    own: list[int]
    num_frontends: int
    work: ListWork | None = None
    weights: list[float] | None = None

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
        tokens, steps, models = (np.array(r, np.int64) for r in (few.work.tokens, few.work.steps, few.work.models))
        work = ArrayWork(tokens, steps, models, few.work.now_ns, lockstep=few.work.lockstep)
    weights = None if few.weights is None else np.array(few.weights)
    return ArrayColumns(ranks, load, requests, few.own, few.num_frontends, work, weights)
