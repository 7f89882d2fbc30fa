"""Information models: the load that a front-end of the laboratory sees when it decides.

| name | what a front-end sees |
|---|---|
| `live` | the board: every rank's current row, and the requests in flight of all front-ends |
| `live-index` | the same, and which blocks of prompts each rank's cache holds: the prefix index |
| `live-index-ahead` | the same, and blocks that will soon be cached: those of requests that any front-end sent to a rank in the last second |
| `live-index-own` | the same, but only with blocks of this front-end's own requests |
| `live-unbooked` | the current rows, and no requests in flight |
| `broadcast` | all rows at the last broadcast, every 100 ms. Its own requests since then count once for each front-end, as in vLLM's API servers, until the next broadcast overwrites them |
| `broadcast-keep` | the same rows. Its own requests count once, until a broadcast shows them as received |
| `immediate` | each row 1 ms after it changed. Its own requests count until such a row shows them as received |
| `scrape` | all rows at the last scrape, every second, and nothing else, as a gateway does |

A number after a colon is another interval or delay in milliseconds: ``broadcast:10``. For `live-index` it is the
delay of changes of the caches, as for a router that receives events; the default is 0. For the two models below it,
it is the time for which sent requests are remembered.
All models give the same `View`, so each policy runs on each of them.
"""  # noqa: E501 - a table

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Container, Sequence
from typing import Any, Self

from dpshm.board.words import queued
from dpshm.errors import SettingError
from dpshm.policies import View, comparable
from dpshm.policies.columns import ListColumns, ListWork
from dpshm.policies.idle_ranks import IdleRanks
from dpshm.sim.lab.prefix_cache import DelayedCache, hit_tokens
from dpshm.sim.lab.rank import Job, Row, SimRank

NEVER_S = float("inf")


class Information(ABC):
    """An information model.

    Attributes:
        ranks: all ranks.
        own: unfinished requests, by front-end and rank.
        next_tick_s: time of the next call of `tick`.
        lockstep: whether the ranks step together.
    """

    def __init__(self, ranks: list[SimRank], own: list[list[int]]) -> None:
        self.ranks = ranks
        self.own = own
        self.next_tick_s = NEVER_S
        self.lockstep = False
        self._idle = IdleRanks()

    @abstractmethod
    def view(self, frontend: int, order: list[int], now_s: float) -> View:
        """The view of a front-end now."""

    def cached(self, job: Job, now_s: float) -> list[int] | None:
        """By rank, the tokens of a prompt that its cache holds; None where that is unknown."""
        return None

    def tick(self, now_s: float) -> None:
        """Called at `next_tick_s`."""
        return

    def sent(self, job: Job) -> None:
        """Called when a front-end has sent a request."""
        return

    def published(self, rank: int, now_s: float) -> None:
        """Called when a rank has published."""
        return

    def _view(  # noqa: PLR0917 - a view has that many parts
        self,
        frontend: int,
        order: list[int],
        now_s: float,
        rows: Sequence[Row],
        in_flight: list[int],
        in_flight_tokens: list[int],
    ) -> View:
        work = ListWork(
            [r.backlog + tokens for r, tokens in zip(rows, in_flight_tokens, strict=True)],
            [list(r.model[:2]) for r in rows],
            comparable(
                [list(r.model[2:]) for r in rows],
                lockstep=self.lockstep,
                idle=self._idle.look([r.steps for r in rows], int(now_s * 1e9)),
            ),
            int(now_s * 1e9),
        )
        load = [r.load for r in rows]
        requests = [queued(w) + u for w, u in zip(load, in_flight, strict=True)]
        return View(ListColumns(order, load, requests, self.own[frontend], len(self.own), work))


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

    def __init__(self, ranks: list[SimRank], own: list[list[int]], remembered_s: float, *, own_only: bool) -> None:
        super().__init__(ranks, own, 0.0)
        self._remembered_s = remembered_s
        memories = [[_Sent() for _ in ranks] for _ in (own if own_only else own[:1])]
        self._sent = memories if own_only else memories * len(own)  # by front-end, then by rank

    def sent(self, job: Job) -> None:
        self._sent[job.frontend][job.rank].add(job.blocks, self._now_s + self._remembered_s)

    def cached(self, job: Job, now_s: float) -> list[int] | None:
        self._now_s = now_s
        if not job.blocks:
            return None
        return [
            hit_tokens(memory.beside(rank.cache, now_s), job.blocks, job.prompt_tokens, rank.cache.block_tokens)
            for rank, memory in zip(self.ranks, self._sent[job.frontend], strict=True)
        ]

    _now_s = 0.0


class _Sent:
    """Blocks that were sent to a rank, each until a time."""

    def __init__(self) -> None:
        self._until_s: dict[object, float] = {}
        self._cache: Container[int] = ()
        self._now_s = 0.0

    def add(self, blocks: Sequence[int], until_s: float) -> None:
        """They are on their way."""
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


class Broadcast(Information):
    """All rows, at an interval."""

    def __init__(self, ranks: list[SimRank], own: list[list[int]], interval_s: float, times: int) -> None:
        super().__init__(ranks, own)
        self._interval_s = interval_s
        self._times = times  # how often a request that it sent counts
        self._count = 0
        self.tick(0.0)

    def tick(self, now_s: float) -> None:
        self._rows = [r.row for r in self.ranks]
        n = len(self.ranks)
        self._bumps = [[0] * n for _ in self.own]
        self._bumped_tokens = [[0] * n for _ in self.own]
        self._count += 1
        self.next_tick_s = self._count * self._interval_s

    def sent(self, job: Job) -> None:
        self._bumps[job.frontend][job.rank] += self._times
        self._bumped_tokens[job.frontend][job.rank] += self._times * job.booked_tokens

    def view(self, frontend: int, order: list[int], now_s: float) -> View:
        bumps, tokens = self._bumps[frontend], self._bumped_tokens[frontend]
        return self._view(frontend, order, now_s, self._rows, bumps, tokens)


class _Counting(Information):
    """Requests that a front-end sent, less those that the visible row has received."""

    def __init__(self, ranks: list[SimRank], own: list[list[int]]) -> None:
        super().__init__(ranks, own)
        self._sent = [[0] * len(ranks) for _ in own]
        self._sent_tokens = [[0] * len(ranks) for _ in own]

    def sent(self, job: Job) -> None:
        self._sent[job.frontend][job.rank] += 1
        self._sent_tokens[job.frontend][job.rank] += job.booked_tokens

    def _counted(self, frontend: int, order: list[int], now_s: float, rows: Sequence[Row]) -> View:
        sent, tokens = self._sent[frontend], self._sent_tokens[frontend]
        in_flight = [sent[e] - row.received[frontend] for e, row in enumerate(rows)]
        in_flight_tokens = [tokens[e] - row.received_tokens[frontend] for e, row in enumerate(rows)]
        return self._view(frontend, order, now_s, rows, in_flight, in_flight_tokens)


class BroadcastKeep(_Counting):
    """All rows, at an interval; requests in flight are counted apart."""

    def __init__(self, ranks: list[SimRank], own: list[list[int]], interval_s: float) -> None:
        super().__init__(ranks, own)
        self._interval_s = interval_s
        self._count = 0
        self.tick(0.0)

    def tick(self, now_s: float) -> None:
        self._rows = [r.row for r in self.ranks]
        self._count += 1
        self.next_tick_s = self._count * self._interval_s

    def view(self, frontend: int, order: list[int], now_s: float) -> View:
        return self._counted(frontend, order, now_s, self._rows)


class Immediate(_Counting):
    """Each row after a delay."""

    def __init__(self, ranks: list[SimRank], own: list[list[int]], delay_s: float) -> None:
        super().__init__(ranks, own)
        self._delay_s = delay_s
        self._under_way: list[deque[tuple[float, Row]]] = [deque() for _ in ranks]
        self._rows = [r.row for r in ranks]

    def published(self, rank: int, now_s: float) -> None:
        self._under_way[rank].append((now_s + self._delay_s, self.ranks[rank].row))

    def view(self, frontend: int, order: list[int], now_s: float) -> View:
        for e, queue in enumerate(self._under_way):
            while queue and queue[0][0] <= now_s:
                self._rows[e] = queue.popleft()[1]
        return self._counted(frontend, order, now_s, self._rows)


DEFAULT_MS = {
    "live-index": 0.0,
    "live-index-ahead": 1000.0,
    "live-index-own": 1000.0,
    "broadcast": 100.0,
    "broadcast-keep": 100.0,
    "immediate": 1.0,
    "scrape": 1000.0,
}
NAMES = ("live", "live-unbooked", *DEFAULT_MS)


def check_information(name: str) -> tuple[str, float]:
    """The kind of a model and its interval or delay in seconds (0 for the live ones).

    Raises:
        SettingError: no model has that name.
    """
    kind, colon, number = name.partition(":")
    try:
        ms = float(number) if colon else DEFAULT_MS.get(kind, 0.0)
    except ValueError:
        ms = 0.0
    if kind not in NAMES or (colon and (kind not in DEFAULT_MS or not 0 < ms < 1e9)):
        raise SettingError(
            f"no information model {name!r}: choose one of {', '.join(NAMES)}; those but the live ones take "
            "milliseconds after a colon, as in broadcast:10"
        )
    return kind, ms / 1e3


def make_information(name: str, ranks: list[SimRank], own: list[list[int]]) -> Information:
    """Makes the model of that name over these ranks."""
    kind, seconds = check_information(name)
    made: dict[str, Any] = {
        "live": lambda: Live(ranks, own),
        "live-index": lambda: LiveIndex(ranks, own, seconds),
        "live-index-ahead": lambda: LiveIndexAhead(ranks, own, seconds, own_only=False),
        "live-index-own": lambda: LiveIndexAhead(ranks, own, seconds, own_only=True),
        "live-unbooked": lambda: LiveUnbooked(ranks, own),
        "broadcast": lambda: Broadcast(ranks, own, seconds, times=len(own)),
        "broadcast-keep": lambda: BroadcastKeep(ranks, own, seconds),
        "immediate": lambda: Immediate(ranks, own, seconds),
        "scrape": lambda: Broadcast(ranks, own, seconds, times=0),
    }
    return made[kind]()  # type: ignore[no-any-return]
