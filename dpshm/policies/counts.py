"""Policies that look at counts of requests alone."""

from __future__ import annotations

import msgspec

from dpshm import layout
from dpshm.policies.hashing import mix
from dpshm.policies.view import Request, View


def least_loaded(view: View, request: Request) -> int:
    """Join the shortest queue: the least requests, reported plus unseen.

    For engines that report neither tokens nor steps; `dpshm.policies.LeastWork` is as good there, and dearer.

    Formula: ``argmin(waiting + running + unseen)``.
    """
    return view.least(view.requests)


def vllm(view: View, request: Request) -> int:
    """The choice of vLLM 0.32's API servers, fed from the board instead of a broadcast.

    Formula: ``argmin(max(num_frontends * own, waiting + running) + 6 * waiting * max(0, kv_cache_usage - 0.5))``.
    Source: ``DPLBAsyncMPClient.get_core_engine_for_request``. Where vLLM raises the waiting count in its own
    copy for each request sent, the board has the bookings of all front-ends: they count as waiting here.
    """
    unseen = view.unseen

    def score(rank: int) -> float:
        waiting, running, kv_cache_usage = layout.unpack_load(int(view.load[rank]))
        waiting += int(unseen[rank])
        pressure = 6 * waiting * max(0.0, kv_cache_usage - 0.5)
        return max(view.num_frontends * int(view.own[rank]), waiting + running) + pressure

    return int(min(view.ranks, key=score))


def round_robin(view: View, request: Request) -> int:
    """Each rank in turn, whatever its load: the order turns by one with every decision, so the first will do."""
    return int(view.ranks[0])


class PowerOfTwo(msgspec.Struct, frozen=True):
    """The less loaded of two ranks drawn at random.

    Formula: two different ranks, each pair equally likely; of them the one with fewer requests, reported plus
    unseen. The draw is a hash of what the view holds, so equal input gives an equal choice.
    Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 12(10), 2001.

    Attributes:
        seed: another seed draws other pairs.
    """

    seed: int = 0

    def __call__(self, view: View, request: Request) -> int:
        """See `dpshm.policies.Policy`."""
        ranks = view.free()
        if len(ranks) == 1:
            return ranks[0]
        requests = view.requests
        # The order of ranks turns with every decision and the counts change, so the draw does too.
        drawn = mix(self.seed)
        for word in (ranks[0], request.prompt_tokens, *view.own):
            drawn = mix(drawn ^ word)
        first = drawn % len(ranks)
        second = (first + 1 + (drawn >> 32) % (len(ranks) - 1)) % len(ranks)
        one, other = ranks[first], ranks[second]
        return one if requests[one] <= requests[other] else other
