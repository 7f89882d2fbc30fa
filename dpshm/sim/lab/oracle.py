"""The clairvoyant policy: tries a request on a copy of each rank and takes the rank with the earliest first token.

It knows what no front-end can know: how many tokens every running request will still generate, and what each rank
has in its prefix cache. It is greedy, not optimal: it ignores the requests that come later. It also ignores that
ranks in lockstep wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from dpshm.sim.batching import SimRequest
from dpshm.sim.lab.prefix_cache import hit_tokens
from dpshm.sim.lab.rank import Job, SimRank


def soonest(ranks: Sequence[SimRank], order: Sequence[int], job: Job, now_s: float) -> int:
    """The first rank in `order` on which the request's first token would come soonest."""
    bounded = sorted((_lower_bound(ranks[r], job, now_s), position, r) for position, r in enumerate(order))
    best_s, best = float("inf"), order[0]
    for bound_s, _, r in bounded:
        if bound_s >= best_s:
            break
        found_s = first_token(ranks[r], job, now_s, give_up_s=best_s)
        if found_s < best_s:
            best_s, best = found_s, r
    return best


def first_token(rank: SimRank, job: Job, now_s: float, give_up_s: float = float("inf")) -> float:
    """When a request sent to this rank now would have its first token; infinite if later than `give_up_s`."""
    prefixes = _Foreseen(rank)
    batcher = rank.batcher.copy(prefixes)
    time_s = now_s
    if rank.busy_until_s >= 0:
        time_s = rank.busy_until_s
        batcher.finish(rank.step)
    for other in rank.inbox:
        batcher.add(SimRequest(other, other.prompt_tokens, other.output_tokens))
    mine = SimRequest(job, job.prompt_tokens, job.output_tokens)
    batcher.add(mine)
    while not mine.started:
        step = batcher.plan()
        time_s += step.seconds
        if time_s > give_up_s:
            return float("inf")
        batcher.finish(step)
    return time_s


class _Foreseen:
    """A rank's cache, and what the copy of its batcher computes; the rank's own stays unchanged."""

    def __init__(self, rank: SimRank) -> None:
        self._held = rank.cache
        self._added: set[int] = set()

    def __contains__(self, block: object) -> bool:
        return block in self._added or block in self._held

    def cached(self, request: SimRequest) -> int:
        """See `dpshm.sim.batching.PrefixSource`."""
        job = request.key
        return hit_tokens(self, job.blocks, job.prompt_tokens, self._held.block_tokens) if job.blocks else 0

    def computed(self, request: SimRequest, tokens: int) -> None:
        """See `dpshm.sim.batching.PrefixSource`."""
        if blocks := request.key.blocks:
            whole = tokens >= request.prompt_tokens
            self._added.update(blocks if whole else blocks[: tokens // self._held.block_tokens])


def _lower_bound(rank: SimRank, job: Job, now_s: float) -> float:
    """It cannot be sooner: the running step has to end, and one token at least to be computed.

    Without shared prefixes all prompt tokens before its own, and its own, have to be computed. Of prompts with
    blocks the requests before it may leave any part cached.
    """
    cost = rank.batcher.cost
    start_s = now_s if rank.busy_until_s < 0 else rank.busy_until_s
    if job.blocks:
        return start_s + cost.base_s + cost.per_prompt_token_s
    left = rank.batcher.prefill_backlog + job.prompt_tokens
    if rank.busy_until_s >= 0:
        left -= rank.step.prompt_tokens
    steps = -(-left // cost.max_step_tokens)
    return start_s + steps * cost.base_s + left * cost.per_prompt_token_s
