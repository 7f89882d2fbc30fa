"""Policies that look at counts of requests alone."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from dpshm.board.words import unpack_load
from dpshm.policies.columns import ArrayColumns, Columns, ListColumns, Words
from dpshm.policies.view import Request, View
from dpshm.rules.hashing import mix

_TOKEN_BITS = 32  # a prompt has fewer tokens than one request more weighs


def least_loaded(view: View, request: Request) -> int:
    """Join the shortest queue: the least requests, reported plus in flight.

    For engines that report neither tokens nor steps; `dpshm.policies.LeastWork` is as good there, and dearer.

    Formula: ``argmin(waiting + running + in flight)``; of equal ranks the one that has most of the prompt cached.
    With weights: ``argmin((waiting + running + in flight + 1) / weight)``.
    """
    columns: Any = view.columns  # its requests and what its `least` takes are both lists, or both arrays
    if columns.weights is not None:
        return view.least(_weighted(view, request))
    if request.cached is None:
        return columns.least(columns.requests)  # type: ignore[no-any-return]
    if isinstance(columns, ListColumns):
        by_rank = zip(columns.requests, request.cached, strict=False)
        return columns.least([(requests << _TOKEN_BITS) - cached for requests, cached in by_rank])
    return columns.least((columns.requests << _TOKEN_BITS) - np.array(request.cached))  # type: ignore[no-any-return]


def _weighted(view: View, request: Request) -> list[float]:
    """By rank, the requests that it would have with this one, relative to its speed; cached tokens break ties."""
    cached = request.cached or [0] * len(view.requests)
    by_rank = zip(view.requests, view.weights, cached, strict=False)
    return [(requests + 1) / weight - hit / (1 << _TOKEN_BITS) for requests, weight, hit in by_rank]


def vllm(view: View, request: Request) -> int:
    """The choice of vLLM 0.32's API servers, fed from the board instead of a broadcast.

    Formula: ``argmin(max(num_frontends * own, waiting + running) + 6 * waiting * max(0, kv_cache_usage - 0.5))``.
    Source: ``DPLBAsyncMPClient.get_core_engine_for_request``. Where vLLM raises the waiting count in its own
    copy for each request sent, the board has the bookings of all front-ends: they count as waiting here.
    """
    columns = view.columns
    return _vllm_of_few(columns) if isinstance(columns, ListColumns) else _vllm_of_many(columns)


def _vllm_of_few(columns: ListColumns) -> int:
    scores = []
    # One item a rank in each; `strict` would cost a tenth of the decision.
    for word, requests, own in zip(columns.load, columns.requests, columns.own):  # noqa: B905
        waiting, running, kv_cache_usage = unpack_load(word)
        waiting = max(waiting, requests - running)
        pressure = 6 * waiting * max(0.0, kv_cache_usage - 0.5)
        scores.append(max(columns.num_frontends * own, waiting + running) + pressure)
    return min(columns.ranks, key=scores.__getitem__)


def _vllm_of_many(columns: ArrayColumns) -> int:
    load: Any = columns.load  # it is unpacked elementwise
    waiting, running, kv_cache_usage = map(np.asarray, unpack_load(load))
    waiting = np.maximum(waiting, columns.requests - running)
    pressure = 6 * waiting * np.maximum(kv_cache_usage - 0.5, 0.0)
    scores = np.maximum(columns.num_frontends * np.array(columns.own), waiting + running) + pressure
    return int(columns.ranks[scores[columns.ranks].argmin()])


def round_robin(view: View, request: Request) -> int:
    """Each rank in turn, whatever its load: the order turns by one with every decision, so the first will do."""
    return int(view.columns.ranks[0])


class PowerOfTwo(msgspec.Struct, frozen=True):
    """The less loaded of two ranks drawn at random.

    Formula: two different ranks, each pair equally likely; of them the one with fewer requests, reported plus
    in flight (with weights: relative to the weight). The draw is a hash of what the view holds, so equal input
    gives an equal choice.
    Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 12(10), 2001.

    Attributes:
        seed: another seed draws other pairs.
    """

    seed: int = 0

    def __call__(self, view: View, request: Request) -> int:
        """See `dpshm.policies.Policy`."""
        columns = view.columns
        one, other = self._draw(columns.ranks, columns, request)
        if view.overloaded(one) or view.overloaded(other):  # rare
            one, other = self._draw(columns.free(), columns, request)
        if columns.weights is not None:
            scores = _weighted(view, request)
            return one if scores[one] <= scores[other] else other
        return one if columns.requests[one] <= columns.requests[other] else other

    def _draw(self, ranks: list[int] | Words, columns: Columns, request: Request) -> tuple[int, int]:
        """Two different ones of these ranks, if there are two."""
        n = len(ranks)
        drawn, at = self.seed, int(ranks[0])
        # The order of ranks turns with every decision and what a rank has changes, so the draw does too.
        for word in (at, request.prompt_tokens, int(columns.load[at]), int(columns.requests[at]), columns.own[at]):
            drawn = mix(drawn ^ word)
        first = drawn % n
        second = (first + 1 + (drawn >> 32) % max(1, n - 1)) % n
        return int(ranks[first]), int(ranks[second])
