"""Policies: which engine takes a request, as pure functions of what one decision sees.

A policy is any callable ``(view, request) -> dp_rank``. `View` is the board at one instant, read by the
front-end in the right order; ``view.ranks`` are the ranks that may be chosen (not absent, dead, stalled or
drained), never empty, in an order that turns with every decision and starts elsewhere in each front-end:
a policy that takes the *first* of several equal ranks therefore breaks ties fairly and differently from
its neighbours. All sequences but `ranks` are indexed by dp_rank and hold every rank of the group.

With fewer than `VECTOR_FROM` ranks the sequences are lists, because a loop over 8 engines is faster than
a handful of numpy calls; from there on they are int64 arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from dpshm import layout
from dpshm.errors import SettingError

VECTOR_FROM = 32
"""Ranks from which on a view holds arrays. The two cost the same at about this size."""

Sequence64: TypeAlias = "list[int] | NDArray[np.int64]"


class Request(msgspec.Struct, frozen=True, gc=False):
    """What is known of a request when its engine is chosen."""

    prompt_tokens: int = 0


class View(msgspec.Struct, eq=False, gc=False):
    """What one decision sees.

    Attributes:
        ranks: who may be chosen, in the order that breaks ties.
        load: reported load, packed (`dpshm.layout.unpack_load`).
        unseen: requests that any front-end sent and the engine has not received, by rank.
        own: requests of this front-end that are unfinished, by rank.
        num_frontends: live front-ends.
    """

    ranks: Any
    load: Any
    unseen: Any
    own: list[int]
    num_frontends: int

    @property
    def requests(self) -> Sequence64:
        """Requests by rank: waiting, running and unseen."""
        load, unseen = self.load, self.unseen
        if isinstance(load, list):
            # Both have one item a rank; `strict` would cost a tenth of the decision.
            return [(w >> 40) + (w >> 16 & 0xFFFFFF) + u for w, u in zip(load, unseen)]  # noqa: B905
        total: NDArray[np.int64] = (load >> 40) + (load >> 16 & 0xFFFFFF) + unseen
        return total

    def least(self, scores: Sequence64) -> int:
        """The first of the ranks that may be chosen whose score is least."""
        ranks = self.ranks
        if isinstance(scores, list):
            return int(min(ranks, key=scores.__getitem__))
        return int(ranks[int(scores[ranks].argmin())])


Policy: TypeAlias = Callable[[View, Request], int]


def least_loaded(view: View, request: Request) -> int:
    """Join the shortest queue: the least requests, reported plus unseen. The default."""
    return view.least(view.requests)


def vllm(view: View, request: Request) -> int:
    """The choice of vLLM 0.32's API servers, fed from the board instead of a broadcast.

    The least of ``max(num_frontends * own, waiting + running) + 6 * waiting * max(0, kv_cache_usage - 0.5)``.
    Source: ``DPLBAsyncMPClient.get_core_engine_for_request``. Where vLLM raises the waiting count in its own
    copy for each request sent, the board has the bookings of all front-ends: they count as waiting here.
    """

    def score(rank: int) -> float:
        waiting, running, kv_cache_usage = layout.unpack_load(int(view.load[rank]))
        waiting += int(view.unseen[rank])
        pressure = 6 * waiting * max(0.0, kv_cache_usage - 0.5)
        return max(view.num_frontends * int(view.own[rank]), waiting + running) + pressure

    return int(min(view.ranks, key=score))


def round_robin(view: View, request: Request) -> int:
    """Each rank in turn, whatever its load: the order turns by one with every decision, so the first will do."""
    return int(view.ranks[0])


_POLICIES: dict[str, Policy] = {"least_loaded": least_loaded, "round_robin": round_robin, "vllm": vllm}
NAMES = tuple(_POLICIES)


def by_name(name: str) -> Policy:
    """The policy of that name.

    Raises:
        SettingError: there is none of that name.
    """
    try:
        return _POLICIES[name]
    except KeyError:
        raise SettingError(f"no policy {name!r}: choose one of {', '.join(NAMES)}") from None
