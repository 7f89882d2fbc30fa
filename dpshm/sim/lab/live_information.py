"""Information models that see every rank's current row: the board, with and without bookings and prefix index."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Self

from dpshm.policies import View
from dpshm.sim.lab.prefix_cache import DelayedCache, hit_tokens
from dpshm.sim.lab.rank import Job, SimRank
from dpshm.sim.lab.view_model import Information


class Live(Information):
    """The board."""

    def view(self, frontend: int, order: list[int], now_s: float) -> View:
        ranks = self.ranks
        return self._view(
            frontend,
            order,
            now_s,
            [r.row for r in ranks],
            [len(r.inbox) for r in ranks],
            [r.inbox_tokens for r in ranks],
        )


class LiveIndex(Live):
    """The board and the prefix index."""

    def __init__(self, ranks: list[SimRank], own: list[list[int]], delay_s: float) -> None:
        super().__init__(ranks, own)
        self._delay_s = delay_s
        self._delayed = [DelayedCache(delay_s, rank.cache.block_tokens) for rank in ranks] if delay_s else []
        self._followed: list[SimRank | None] = [None] * len(ranks)
        for rank in range(len(ranks) if delay_s else 0):
            self._follow(rank)

    def published(self, rank: int, now_s: float) -> None:
        if self._delayed and self.ranks[rank] is not self._followed[rank]:
            self._follow(rank)

    def cached(self, job: Job, now_s: float) -> list[int] | None:
        if not job.blocks:
            return None
        if self._delayed:
            return [d.hit_tokens(now_s, job.blocks, job.prompt_tokens) for d in self._delayed]
        return [r.cache.hit_tokens(job.blocks, job.prompt_tokens) for r in self.ranks]

    def _follow(self, rank: int) -> None:
        """Registers for the cache changes of a rank that has just started."""
        sim, delayed = self.ranks[rank], DelayedCache(self._delay_s, self.ranks[rank].cache.block_tokens)
        self._followed[rank], self._delayed[rank] = sim, delayed
        sim.cache.changed = delayed.note


class LiveIndexAhead(LiveIndex):
    """The board, the prefix index, and the blocks of what was sent a moment ago."""

    def __init__(self, ranks: list[SimRank], own: list[list[int]], remembered_s: float) -> None:
        super().__init__(ranks, own, 0.0)
        self._remembered_s = remembered_s
        self._sent = [_Sent() for _ in ranks]

    def sent(self, job: Job) -> None:
        self._sent[job.rank].add(job.blocks, self._now_s + self._remembered_s)

    def cached(self, job: Job, now_s: float) -> list[int] | None:
        self._now_s = now_s
        if not job.blocks:
            return None
        return [
            hit_tokens(memory.beside(rank.cache, now_s), job.blocks, job.prompt_tokens, rank.cache.block_tokens)
            for rank, memory in zip(self.ranks, self._sent, strict=True)
        ]

    _now_s = 0.0


class _Sent:
    """Blocks that were sent to a rank, each until a time."""

    def __init__(self) -> None:
        self._until_s: dict[object, float] = {}
        self._cache: Container[int] = ()
        self._now_s = 0.0

    def add(self, blocks: Sequence[int], until_s: float) -> None:
        """They are in flight."""
        for block in blocks:
            self._until_s[block] = until_s

    def beside(self, cache: Container[int], now_s: float) -> Self:
        """Itself and what the rank's cache holds."""
        self._cache, self._now_s = cache, now_s
        return self

    def __contains__(self, block: object) -> bool:
        return block in self._cache or self._until_s.get(block, 0.0) > self._now_s


class LiveUnbooked(Information):
    """The board without bookings."""

    def view(self, frontend: int, order: list[int], now_s: float) -> View:
        nothing = [0] * len(self.ranks)
        return self._view(frontend, order, now_s, [r.row for r in self.ranks], nothing, nothing)
