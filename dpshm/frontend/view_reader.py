"""Reads the board for decisions: the ranks that may be chosen, and what a policy is shown of all ranks.

`ViewReader.read` reads what changes with each request. `ViewReader.refresh` works out what changes seldom: the
number of ranks, verdicts, the front-ends whose bookings count, and step models. The front-end refreshes when the
board's revision changed, and every 100 ms.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Collection, Mapping
from math import gcd
from typing import Any

import numpy as np

from dpshm.board import layout
from dpshm.board.board import Board
from dpshm.board.words import DRAINED, ON_BEHALF, REMOTE, unpack_load, unpack_state
from dpshm.errors import NoEngineAvailable, Overloaded, SettingError
from dpshm.policies import View, comparable
from dpshm.policies.columns import VECTOR_FROM, ArrayColumns, ArrayWork, ListColumns, ListWork
from dpshm.policies.idle_ranks import IdleRanks
from dpshm.policies.work import prepare
from dpshm.rules.liveness import HANGING, Verdict

GOLDEN_RATIO = (5**0.5 + 1) / 2


def first_turn(number: int, count: int) -> int:
    """Where the front-end of that number begins among so many ranks.

    Of any `count` numbers in a row, each has another place. Neighbours begin far apart: the distance is the one
    nearest to the golden section that has no divisor in common with the number of ranks.
    """
    apart = min(
        (distance for distance in range(1, count + 1) if gcd(distance, count) == 1),
        key=lambda distance: abs(distance - count / GOLDEN_RATIO),
    )
    return number * apart % count


class ViewReader:
    """What one front-end sees of the board. Called under the front-end's lock.

    Attributes:
        dp_size: how many ranks there are.
        eligible: the ranks that a policy may choose.
        revision: the board's revision at the last `refresh`.
        late: by rank whose row comes late (of another node, or stock), CLOCK_MONOTONIC ns at which it was heard.
    """

    dp_size: int
    eligible: frozenset[int]
    revision: int
    late: dict[int, int]

    def __init__(
        self,
        board: Board,
        index: int,
        own: list[int],
        only: frozenset[int] | None,
        *,
        sees_work: bool,
        weights: Mapping[int, float] | None = None,
        max_requests: int | None = None,
    ) -> None:
        """Reads the board for the first time.

        Args:
            board: the board.
            index: the front-end's row.
            own: the front-end's unfinished requests by rank (`FrontendRow.own`), which views share.
            only: the only ranks that the front-end may choose; None: all.
            sees_work: whether views have work (`View.has_work`).
            weights: by rank, its speed relative to the others'; 1 where it is left out. None: all are equal.
            max_requests: outstanding requests with which a rank of weight 1 is full; None: no rank is ever full.
        """
        self._board = board
        self._words = board.words
        self._own = own
        self._only = only
        self._sees_work = sees_work
        self._weights = weights
        self._max_requests = max_requests
        self._lockstep = board.segment.header.waves  # ranks that have waves step together
        self._idle = IdleRanks()
        self.eligible = frozenset()
        self._at_revision = board.index("revision")
        # Equal loads must not send all front-ends to one engine, nor all that have the same row one after another.
        self._number = index + int(board.frontend_incarnation[index])
        self._turn = 0
        self.refresh()

    def refresh(self) -> None:
        """Works out again which ranks may be chosen and which front-ends' bookings count."""
        board = self._board
        # SYNC: the revision before the marks that it numbers: see `dpshm.coordinator.row`.
        self.revision = self._words[self._at_revision]
        n = self.dp_size = board.dp_size
        self._load = board.load[:n]
        weights, most = self._weights, self._max_requests
        by_rank = None if weights is None else [weights.get(e, 1.0) for e in range(n)]
        self._rank_weights: Any = by_rank if by_rank is None or n < VECTOR_FROM else np.array(by_rank)
        self._limits = None if most is None else [most * weight for weight in by_rank or [1] * n]
        at = board.index("load")
        self._load_words = self._words[at : at + n]  # the same words; of a few, this makes a list twice as fast
        self._beats = board.beat[:n]
        counted = board.counted_frontends()
        self._num_frontends = len(counted)
        self._requests = board.outstanding_requests(counted)
        if self._sees_work:
            self._tokens = board.outstanding_tokens(counted)
            self._steps = board.step_model[:n, : len(layout.STEP_WORDS)]
            # The rest of a running step is known where clocks agree. It counts for all ranks or for none: a rank
            # without it would look less busy than the others.
            self._clocks_agree = all(board.engine_clock_agrees(e) for e in range(n))
            self._step_columns = list(self._steps.T)
            models = board.step_model[:n, len(layout.STEP_WORDS) :]
            # Copied here and not in each decision: step models change slowly.
            idle = self._idle.look(board.steps[:n].tolist(), time.monotonic_ns())
            rows = self._steps.tolist()
            running, held = [unpack_load(word)[1] for word in self._load.tolist()], [row[2] for row in rows]
            learnt = comparable(models.tolist(), lockstep=self._lockstep, idle=idle, running=running, held=held)
            many = np.array(learnt, np.int64) if n >= VECTOR_FROM else None
            self._models: Any = learnt if many is None else many
            self._prepared = None if many is None else prepare(many)
        self._verdicts = board.engine_verdicts()
        marks = board.engine_mark[:n].tolist()
        drained = [bool(mark & DRAINED) for mark in marks]
        self.late = self._heard_late(marks)
        self._states = board.engine_state[:n]
        self._with_rows = [
            e
            for e, verdict in enumerate(self._verdicts)
            if verdict in (Verdict.ALIVE, *HANGING) and not marks[e] & ON_BEHALF
        ]
        eligible = [
            e
            for e, verdict in enumerate(self._verdicts)
            if verdict is Verdict.ALIVE and not drained[e] and (self._only is None or e in self._only)
        ]
        if eligible and len(eligible) != len(self.eligible):
            self._turn = first_turn(self._number, len(eligible))
        self.eligible = frozenset(eligible)
        # Twice over: each slice of half its length is one rotation.
        self._twice: Any = np.array(eligible * 2) if n >= VECTOR_FROM else eligible * 2

    def _heard_late(self, marks: list[int]) -> dict[int, int]:
        late = [e for e, mark in enumerate(marks) if mark & (REMOTE | ON_BEHALF)]
        if not late:
            return {}
        heard = self._board.remote_state[:, layout.REMOTE_WORDS.index("heard")]
        return {e: int(heard[e]) if marks[e] & REMOTE else time.monotonic_ns() for e in late}

    def read(self, now_ns: int, exclude: Collection[int] = ()) -> View:
        """What one decision sees. Some rank must be eligible.

        Args:
            now_ns: CLOCK_MONOTONIC.
            exclude: ranks that this decision may not choose.

        Raises:
            NoEngineAvailable: all eligible ranks are excluded.
            Overloaded: the others are full.
        """
        count = len(self.eligible)
        turn = self._turn = (self._turn + 1) % count
        ranks = self._twice[turn : turn + count]
        n, frontends = self.dp_size, self._num_frontends
        own = self._own if len(self._own) == n else self._own[:n]
        if n >= VECTOR_FROM:
            many = self._many_work(now_ns) if self._sees_work else None
            requests = self._requests.count()
            if exclude or self._limits is not None:
                ranks = np.array(self._narrowed(ranks.tolist(), requests.tolist(), exclude))
            load = np.positive(self._load)
            return View(ArrayColumns(ranks, load, requests, own, frontends, many, self._rank_weights))
        few = self._few_work(now_ns) if self._sees_work else None
        counts = self._requests.count().tolist()
        if exclude or self._limits is not None:
            ranks = self._narrowed(ranks, counts, exclude)
        load_words = self._load_words.tolist()
        return View(ListColumns(ranks, load_words, counts, own, frontends, few, self._rank_weights))

    def _narrowed(self, ranks: list[int], requests: list[int], exclude: Collection[int]) -> list[int]:
        """Those of some ranks that are neither excluded nor full."""
        left = [rank for rank in ranks if rank not in exclude]
        if not left:
            raise NoEngineAvailable(f"{self.why_none()}; this request excludes {sorted(exclude)}")
        limits = self._limits
        if limits is None:
            return left
        free = [rank for rank in left if requests[rank] < limits[rank]]
        if not free:
            counts = ", ".join(f"{rank}: {requests[rank]} of {limits[rank]:g}" for rank in sorted(left))
            raise Overloaded(
                f"each rank of group {self._board.segment.group!r} that may be chosen has as many requests as "
                f"max_requests={self._max_requests} allows ({counts}): answer 503, or try again later"
            )
        return free

    def read_wave(self, least: int) -> tuple[int, bool]:
        """The highest wave of live rows, at least `least`; and whether a rank sleeps that the wave may need.

        A rank that the user paused does not wake. A stock engine's row shows no wave.
        """
        states = self._states.tolist()
        rows = [unpack_state(states[e]) for e in self._with_rows]
        wave = max((row[0] for row in rows), default=least)
        wave = max(wave, least)
        return wave, any(not paused and not (running and at == wave) for at, running, paused in rows)

    def read_beats(self) -> list[int]:
        """By rank, CLOCK_MONOTONIC ns of its newest report; 0 for a rank whose clock is another."""
        beats: list[int] = self._beats.tolist()
        return [beat if self._board.engine_clock_agrees(e) else 0 for e, beat in enumerate(beats)]

    def check_pinned(self, dp_rank: int, exclude: Collection[int] = ()) -> int:
        """Checks that a request may be sent to a rank that its caller named. Returns it as an int.

        Raises:
            NoEngineAvailable: the rank is absent or dead.
            Overloaded: it is full.
            SettingError: this front-end may not choose the rank, or the request excludes it.
        """
        dp_rank = operator.index(dp_rank)  # numpy's integers, too
        if not 0 <= dp_rank < self.dp_size or (self._only is not None and dp_rank not in self._only):
            allowed = sorted(self._only) if self._only is not None else f"0 to {self.dp_size - 1}"
            raise SettingError(f"dp_rank {dp_rank} is not one that this front-end may choose: {allowed}")
        if exclude and dp_rank in exclude:
            raise SettingError(f"dp_rank {dp_rank} is both named and excluded")
        verdict = self._verdicts[dp_rank]
        if verdict not in (Verdict.ALIVE, Verdict.UNKNOWN, *HANGING):
            raise NoEngineAvailable(
                f"engine {dp_rank} of group {self._board.segment.group!r}, to which the request is pinned, is "
                f"{verdict.name.lower()}"
            )
        if self._limits is not None:
            self._narrowed([dp_rank], self._requests.count().tolist(), ())
        return dp_rank

    def missing(self) -> list[int]:
        """The ranks that this front-end may choose and that no living process has."""
        there = (Verdict.ALIVE, *HANGING)
        return [
            e
            for e, verdict in enumerate(self._verdicts)
            if verdict not in there and (self._only is None or e in self._only)
        ]

    def why_none(self) -> str:
        """Why no rank is eligible, for an error."""
        states = ", ".join(f"{row['dp_rank']} {row['state']}" for row in self._board.snapshot())
        only = "" if self._only is None else f"; this front-end may choose {sorted(self._only)} alone"
        group = self._board.segment.group
        return f"no engine of group {group!r} may be chosen: {states or 'there are none'}{only}"

    def _few_work(self, now_ns: int) -> ListWork:
        steps = self._steps.tolist()
        if not self._clocks_agree:
            steps = [[0, *rest] for _, *rest in steps]
        return ListWork(self._tokens.count().tolist(), steps, self._models, now_ns, self._lockstep)

    def _many_work(self, now_ns: int) -> ArrayWork:
        # Column by column: at 1024 ranks a fifth of the time of one copy of all.
        steps = np.empty((len(layout.STEP_WORDS), self.dp_size), np.int64)
        steps[0], steps[1], steps[2] = self._step_columns
        if not self._clocks_agree:
            steps[0] = 0
        return ArrayWork(self._tokens.count(), steps.T, self._models, now_ns, self._prepared, self._lockstep)
