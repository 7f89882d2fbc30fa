"""What one decision sees: the request, and the board at one instant.

All sequences but `View.ranks` are indexed by dp_rank and hold every rank of the group. With fewer than
`VECTOR_FROM` ranks they are lists, because a loop over 8 engines is faster than a handful of numpy calls; from
there on they are int64 arrays.

Always there are the counts. Tokens and step times cost more to read and stand in `View.work`, which is None
unless the policy has a true attribute ``sees_work``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from dpshm.board.words import KV_ONE, WAITING_SHIFT, queued

VECTOR_FROM = 32
"""Ranks from which on a view holds arrays. The two cost the same at about this size."""
OVERLOADED_KV = round(0.95 * KV_ONE)
"""A rank with a queue and more of its KV cache in use than this (the low 16 bits of a load word, so 95 %) is
overloaded: what it admits next may push out what it runs."""

Sequence64: TypeAlias = "list[int] | NDArray[np.int64]"


class Request(msgspec.Struct, frozen=True, gc=False):
    """What is known of a request when its engine is chosen.

    Attributes:
        prompt_tokens: as booked.
        key: what `affinity` keeps together, as a number (`dpshm.policies.key_of`); None: nothing.
    """

    prompt_tokens: int = 0
    key: int | None = None


class Work(msgspec.Struct, eq=False, gc=False):
    """What the ranks have to compute and how fast they are, by rank.

    Attributes:
        tokens: prompt tokens that any front-end sent and the engine has not computed.
        steps: by rank the words of `dpshm.board.layout.STEP_WORDS`: the running step.
        models: by rank the words of `dpshm.board.layout.MODEL_WORDS`: what the engine has learnt of its steps,
            made
            comparable (`dpshm.policies.comparable`). They change slowly and may be some tenths of a second old.
        now_ns: CLOCK_MONOTONIC.
    """

    tokens: Any
    steps: Any
    models: Any
    now_ns: int


class View(msgspec.Struct, eq=False, gc=False):
    """What one decision sees.

    Attributes:
        ranks: who may be chosen, never empty, in the order that breaks ties.
        load: reported load, packed (`dpshm.board.words.unpack_load`).
        requests: by rank those waiting, running, and sent by any front-end but not received (`in_flight`).
        own: requests of this front-end that are unfinished, by rank.
        num_frontends: live front-ends.
        work: tokens and step times, for policies that ask for them.
    """

    ranks: Any
    load: Any
    requests: Any
    own: list[int]
    num_frontends: int
    work: Work | None = None

    @property
    def in_flight(self) -> Sequence64:
        """Requests by rank that were sent and not received: those that are neither waiting nor running."""
        load, requests = self.load, self.requests
        if isinstance(load, list):
            return [max(0, n - queued(w)) for n, w in zip(requests, load, strict=True)]
        in_flight: NDArray[np.int64] = np.maximum(requests - queued(load), 0)
        return in_flight

    def overloaded(self, rank: int) -> bool:
        """Whether a rank has a queue and hardly any KV cache left."""
        word = int(self.load[rank])
        return word >> WAITING_SHIFT > 0 and word & KV_ONE > OVERLOADED_KV

    def free(self) -> Any:
        """The ranks that may be chosen and are not overloaded, in their order; if all are, all of them."""
        ranks = self.ranks
        if isinstance(ranks, list):
            return [r for r in ranks if not self.overloaded(r)] or ranks
        words = self.load[ranks]
        free = ranks[(words >> WAITING_SHIFT <= 0) | (words & KV_ONE <= OVERLOADED_KV)]
        return free if len(free) else ranks

    def least(self, scores: Any) -> int:
        """The first of the ranks that may be chosen whose score is least; an overloaded one only if all are."""
        ranks = self.ranks
        best: int = min(ranks, key=scores.__getitem__) if isinstance(scores, list) else first_least(ranks, scores)
        # `overloaded`, spelt out. It is rare, so it is looked at last: the least of all is the least of the free.
        word = self.load[best]
        if word >> WAITING_SHIFT > 0 and word & KV_ONE > OVERLOADED_KV:
            best = first_least(self.free(), scores)
        return best


def first_least(ranks: Any, scores: Any) -> int:
    """The first of some ranks whose score is least; both are lists, or both are arrays."""
    if isinstance(scores, list):
        return int(min(ranks, key=scores.__getitem__))
    return int(ranks[scores[ranks].argmin()])


Policy: TypeAlias = Callable[[View, Request], int]
