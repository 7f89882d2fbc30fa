"""What all information models share: how rows and counts become the view of one front-end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from dpshm.board.words import queued, unpack_load
from dpshm.policies import Policy, View, comparable
from dpshm.policies.columns import VECTOR_FROM, ArrayColumns, ListColumns, ListWork
from dpshm.policies.idle_ranks import IdleRanks
from dpshm.policies.step_model import HELD_TOKENS
from dpshm.sim.lab.many_ranks import STEPS, ManyRanks
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
        self._many = ManyRanks(len(ranks), self._compared)

    @abstractmethod
    def view(self, frontend: int, order: list[int], now_s: float) -> View:
        """The view of a front-end now."""

    def suited(self, policy: Policy, frontend: int) -> Policy:
        """What a front-end makes of a policy, for what it knows."""
        return policy

    def cached(self, job: Job, now_s: float) -> list[int] | None:
        """By rank, the tokens of a prompt that its cache holds; None where that is unknown."""
        return None

    def tick(self, now_s: float) -> None:
        """Called at `next_tick_s`."""
        return

    def sent(self, job: Job) -> None:
        """Called when a front-end has sent a request."""
        return

    def step_ended(self) -> None:
        """Called in lockstep when a step has ended, before the ranks receive the requests that came in it."""
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
        if len(rows) >= VECTOR_FROM:
            counts = np.array((in_flight, in_flight_tokens))
            words, many = self._many.look(rows, counts, now_s, lockstep=self.lockstep)
            own = self.own[frontend]
            return View(ArrayColumns(np.array(order), words, many.rows.requests, own, len(self.own), many))
        work = ListWork(
            [r.backlog + tokens for r, tokens in zip(rows, in_flight_tokens, strict=True)],
            [list(column) for column in zip(*(r.model[:STEPS] for r in rows), strict=True)],
            self._compared(rows, now_s),
            int(now_s * 1e9),
            self.lockstep,
        )
        load = [r.load for r in rows]
        requests = [queued(w) + u for w, u in zip(load, in_flight, strict=True)]
        return View(ListColumns(order, load, requests, self.own[frontend], len(self.own), work))

    def _compared(self, rows: Sequence[Row], now_s: float) -> list[list[int]]:
        return comparable(
            [list(r.model[STEPS:]) for r in rows],
            lockstep=self.lockstep,
            idle=self._idle.look([r.steps for r in rows], int(now_s * 1e9)),
            running=[unpack_load(r.load)[1] for r in rows] if self.lockstep else (),
            held=[r.model[HELD_TOKENS] for r in rows] if self.lockstep else (),
        )
