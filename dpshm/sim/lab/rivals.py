"""Published routing rules of other projects, for comparison in the laboratory only.

They use the same views as the policies of `dpshm.policies`. `dpshm.sim.lab.information` tells them what caches
hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from dpshm.policies import Policy, Request, View, by_name
from dpshm.rules.hashing import mix


def lmetric(view: View, request: Request) -> int:
    """New prefill tokens times batch size, the least product.

    Formula: ``argmin((prompt tokens to compute there, this prompt's uncached ones among them) * (requests + 1))``.
    Source: Zhang et al., "LMetric: Simple is Better - Multiplication May Be All You Need for LLM Request
    Scheduling", arXiv 2603.15202, 2026. One is added to the batch size, which counts this request: a product
    with an empty rank would be 0 whatever has to be computed there.
    """
    work = view.work
    tokens = work.tokens if work is not None else [0] * len(view.requests)
    cached = request.cached or [0] * len(tokens)
    own = request.prompt_tokens
    scores = [
        (waiting + max(1, own - hit)) * (requests + 1)
        for waiting, hit, requests in zip(tokens, cached, view.requests, strict=True)
    ]
    return min(view.ranks, key=scores.__getitem__)


lmetric.sees_work = True  # type: ignore[attr-defined]


def bounded_hashing(view: View, request: Request) -> int:
    """Consistent hashing of the key with bounded loads: the next rank on a ring that has room.

    Formula: the first rank clockwise from the key with ``requests < 1.25 * (mean requests + 1)``.
    Source: Mirrokni, Thorup, Zadimoghaddam, "Consistent Hashing with Bounded Loads", SODA 2018; load is counted in
    requests and the bound is 1.25, as the routers of the field do. `dpshm.policies.Affinity` differs in both.
    """
    ranks, requests = view.ranks, view.requests
    bound = 1.25 * (sum(requests[r] for r in ranks) / len(ranks) + 1)
    if request.key is None:
        return min(ranks, key=requests.__getitem__)
    allowed = set(ranks)
    order = [r for r in _ring_order(len(requests), request.key) if r in allowed]
    return next((r for r in order if requests[r] < bound), order[0])


def sticky(view: View, request: Request) -> int:
    """Where most of the prompt is cached, if that is half of it and the rank has room; else the least loaded.

    Formula: ``argmax(cached)`` if ``cached >= prompt / 2`` and ``requests <= 1.5 * least + 32``, else the least
    requests.
    Source: the cache-aware policy of the SGLang router, whose documentation gives a cache threshold of 0.5 and a
    relative and an absolute balance threshold of 1.5 and 32.
    """
    requests, ranks = view.requests, view.ranks
    least = min(ranks, key=requests.__getitem__)
    if request.cached is None:
        return least
    best = max(ranks, key=request.cached.__getitem__)
    fits = requests[best] <= 1.5 * requests[least] + 32
    return best if fits and 2 * request.cached[best] >= request.prompt_tokens else least


def shortest_kv(view: View, request: Request) -> int:
    """Join the shortest queue by tokens of KV cache: those that are held, and prompt tokens that are in flight.

    Formula: ``argmin(held tokens + prompt tokens sent and not computed)``.
    Source: the metric of the SGLang router's ``minimum_tokens`` (sgl-project/sglang, pull request 7379) and of
    patches of vLLM's balancer that count tokens (vllm-project/vllm, pull request 40795).
    """
    loads = _kv_loads(view)
    return min(view.ranks, key=loads.__getitem__)


def br_0(view: View, request: Request) -> int:
    """BR-0 of BalanceRoute, for one request: it fills what lies below the most loaded rank, and raises that least.

    Formula: ``argmax(s - G * max(0, s - margin))`` with ``margin = most load - load``, load in tokens of KV cache,
    ``s`` prompt tokens and ``G`` ranks; of equal ranks the one with the fewest requests.
    Source: Bu et al., "Tackling the Data-Parallel Load Balancing Bottleneck in LLM Serving: Practical Online
    Routing at Scale", arXiv 2605.06113, 2026. There a pool of requests whose prompts are computed elsewhere waits
    to be placed, and the rule also chooses among these; here each request is placed when it comes.
    """
    loads, requests, size = _kv_loads(view), view.requests, request.prompt_tokens
    most = max(loads[r] for r in view.ranks)
    return min(view.ranks, key=lambda r: (max(0, loads[r] + size - most), requests[r]))


shortest_kv.sees_work = br_0.sees_work = True  # type: ignore[attr-defined]


def _kv_loads(view: View) -> list[int]:
    if not view.has_work:
        return view.requests
    return [held + sent for held, sent in zip(view.work.held_tokens, view.work.tokens, strict=True)]


RIVALS: dict[str, Policy] = {
    "lmetric": lmetric,
    "bounded_hashing": bounded_hashing,
    "sticky": sticky,
    "shortest_kv": shortest_kv,
    "br_0": br_0,
}


def rival_or_policy(name: str) -> Policy:
    """The rule of that name: a rival, or one that `dpshm.policies.by_name` knows.

    Raises:
        SettingError: there is none.
    """
    return RIVALS.get(name) or by_name(name)


@lru_cache(maxsize=65536)
def _ring_order(count: int, key: int) -> Sequence[int]:
    """Ranks in the order in which a ring with 64 points a rank meets them from the key on."""
    ring = _ring(count)
    later = [rank for point, rank in ring if point >= key] + [rank for point, rank in ring if point < key]
    return list(dict.fromkeys(later))


@lru_cache(maxsize=4)
def _ring(count: int) -> list[tuple[int, int]]:
    return sorted((mix(rank << 16 | i) >> 1, rank) for rank in range(count) for i in range(64))
