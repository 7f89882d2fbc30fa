"""Reads the board for decisions: the ranks that may be chosen, and what a policy is shown of all ranks.

`ViewReader.read` reads what changes with each request, and `ViewReader.usual` less of it: what `least_work` needs
in its usual case. `ViewReader.refresh` works out what changes seldom: the number of ranks, verdicts, the
front-ends whose bookings count, and step models. The front-end refreshes when the board's revision changed, and
every 100 ms.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Collection, Mapping
from sys import getrefcount
from typing import Any

import numpy as np

from dpshm.board import layout
from dpshm.board.board import Board
from dpshm.board.words import DRAINED, ON_BEHALF, REMOTE, unpack_load, unpack_state
from dpshm.errors import NoEngineAvailable, Overloaded, SettingError
from dpshm.frontend.turns import Turns
from dpshm.frontend.usual import Reads, Usual, of_few, of_many
from dpshm.policies import View, comparable
from dpshm.policies.alike_of_many import comparable_of_many
from dpshm.policies.columns import VECTOR_FROM, ArrayColumns, ArrayRows, ArrayWork, ListColumns, ListWork
from dpshm.policies.idle_ranks import IdleRanks
from dpshm.policies.prepared import prepare, prepare_arrays
from dpshm.rules.liveness import HANGING, Verdict

_UNSHARED = 3
"""References to rows that no view has: the reader's, a local name, and the count's own argument."""


class ViewReader:
    """What one front-end sees of the board. Called under the front-end's lock.

    Attributes:
        dp_size: how many ranks there are.
        eligible: the ranks that a policy may choose.
        revision: the board's revision at the last `refresh`.
        usual: `least_work` without a view (`dpshm.frontend.usual`); None: it needs one.
        late: by rank whose row comes late (of another node, or stock), CLOCK_MONOTONIC ns at which it was heard.
    """

    dp_size: int
    eligible: frozenset[int]
    revision: int
    usual: Usual | None
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
        self._rows = ArrayRows(0)
        self.eligible = frozenset()
        self._at_revision = board.index("revision")
        # Equal loads must not send all front-ends to one engine, nor all that have the same row one after another.
        self._number = index + int(board.frontend_incarnation[index])
        self._turns = Turns([0], 0, arrays=False)
        self.usual = None
        self._seen: tuple[int, int, list[int]] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Works out again which ranks may be chosen and which front-ends' bookings count.

        While a coordinator watches, that follows from the marks, which the revision numbers, and from the
        front-ends that are there. If these are as they were, only what changes beside them is read.
        """
        board = self._board
        # SYNC: the revision before the marks that it numbers: see `dpshm.coordinator.row`.
        self.revision = self._words[self._at_revision]
        watched, counted = board.is_watched(), board.counted_frontends()
        seen = (self.revision, board.dp_size, counted) if watched else None
        if seen is None or seen != self._seen:
            self._seen = seen
            self._look_at_marks(counted)
        elif self.late:
            self.late = self._heard_late(self._marks)
        # Anew each time, also for equal marks: corrections must not be older (`dpshm.board.outstanding`).
        if self._sees_work:
            self._outstanding = board.outstanding_work(counted, self.dp_size)
            self._requests = self._outstanding.requests
            self._look_at_work()
        else:
            self._requests = board.outstanding_requests(counted)

    def _look_at_marks(self, counted: list[int]) -> None:
        board = self._board
        n = self.dp_size = board.dp_size
        self._load = board.load[:n]
        weights, most = self._weights, self._max_requests
        by_rank = None if weights is None else [weights.get(e, 1.0) for e in range(n)]
        self._rank_weights: Any = by_rank if by_rank is None or n < VECTOR_FROM else np.array(by_rank)
        self._limits = None if most is None else [most * weight for weight in by_rank or [1] * n]
        at = board.index("load")
        self._load_words = self._words[at : at + n]  # the same words; of a few, this makes a list twice as fast
        self._beats = board.beat[:n]
        self._num_frontends = len(counted)
        if self._sees_work:
            self._steps = board.step_model[:n, : len(layout.STEP_WORDS)].T
        self._verdicts = board.engine_verdicts()
        self._marks = marks = board.engine_mark[:n].tolist()
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
        self.eligible = frozenset(eligible)
        arrays = n >= VECTOR_FROM
        if eligible and (eligible != self._turns.ranks or arrays != isinstance(self._turns.current, np.ndarray)):
            self._turns = Turns(eligible, self._number, arrays=arrays)

    def _look_at_work(self) -> None:
        """What the ranks have learnt of their steps, and the short way that follows from it."""
        board, n, lockstep = self._board, self.dp_size, self._lockstep
        # The rest of a running step is known where clocks agree. It counts for all ranks or for none: a rank
        # without it would look less busy than the others.
        self._clocks_agree = all(board.engine_clock_agrees(e) for e in range(n))
        # Copied, and not in each decision: step models change slowly.
        models = board.step_model[:n, len(layout.STEP_WORDS) :]
        idle = self._idle.look(board.steps[:n].tolist(), time.monotonic_ns())
        running, held = [unpack_load(word)[1] for word in self._load.tolist()], self._steps[2]
        if n < VECTOR_FROM:
            self._models: Any = comparable(
                models.tolist(), lockstep=lockstep, idle=idle, running=running, held=held.tolist()
            )
            self._prepared: Any = prepare(self._models)
        else:
            by_rank = {"idle": np.array(idle), "running": np.array(running), "held": held}
            self._models = comparable_of_many(models, lockstep=lockstep, **by_rank)
            self._prepared = prepare_arrays(self._models)
        self._shared = self._prepared.shared
        self.usual = None
        if self._shared and self.eligible and not lockstep and self._limits is None:
            made, models = (of_many, self._prepared) if n >= VECTOR_FROM else (of_few, self._shared)
            parts = self._turns, self._steps, self._outstanding, self._load_words, self._clocks_agree
            self.usual = made(models, Reads(*parts))

    def _heard_late(self, marks: list[int]) -> dict[int, int]:
        late = [e for e, mark in enumerate(marks) if mark & (REMOTE | ON_BEHALF)]
        if not late:
            return {}
        heard = self._board.remote_state[:, layout.REMOTE_WORDS.index("heard")]
        return {e: int(heard[e]) if marks[e] & REMOTE else time.monotonic_ns() for e in late}

    def read(self, now_ns: int, exclude: Collection[int] = (), *, again: bool = False) -> View:
        """What one decision sees. Some rank must be eligible.

        Args:
            now_ns: CLOCK_MONOTONIC.
            exclude: ranks that this decision may not choose.
            again: `usual` was asked before: the order of ranks stays.

        Raises:
            NoEngineAvailable: all eligible ranks are excluded.
            Overloaded: the others are full.
        """
        turns = self._turns
        if not again:
            turns.current = next(turns.orders)
        ranks = turns.current
        n, frontends = self.dp_size, self._num_frontends
        own = self._own if len(self._own) == n else self._own[:n]
        if n >= VECTOR_FROM:
            many = self._many_work(now_ns) if self._sees_work else None
            requests = self._requests.count() if many is None else many.rows.requests
            if exclude or self._limits is not None:
                ranks = np.array(self._narrowed(ranks.tolist(), requests.tolist(), exclude))
            load = np.positive(self._load)
            return View(ArrayColumns(ranks, load, requests, own, frontends, many, self._rank_weights))
        few, counts = self._few_work(now_ns) if self._sees_work else (None, self._requests.count().tolist())
        if exclude or self._limits is not None:
            ranks = self._narrowed(ranks, counts, exclude)
        load_words = self._load_words.tolist()
        return View(ListColumns(ranks, load_words, counts, own, frontends, few, self._rank_weights))

    def rewind(self) -> None:
        """The next decision has the first turn."""
        turns = self._turns
        self._turns = Turns(turns.ranks, self._number, arrays=isinstance(turns.current, np.ndarray))
        if self._sees_work:
            self._look_at_work()

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

    def _few_work(self, now_ns: int) -> tuple[ListWork, list[int]]:
        steps = self._steps.tolist()
        if not self._clocks_agree:
            steps[0] = [0] * self.dp_size
        requests, tokens = self._outstanding.count().tolist()
        return ListWork(tokens, steps, self._models, now_ns, self._lockstep, self._prepared), requests

    def _many_work(self, now_ns: int) -> ArrayWork:
        rows = self._rows
        # The last decision's, unless its policy has kept the view: its numbers stay.
        if len(rows.ends) != self.dp_size or getrefcount(rows) > _UNSHARED:
            rows = self._rows = ArrayRows(self.dp_size)
        # SYNC: an assignment from columns whose words lie apart (here 128 bytes) moves word by word.
        rows.steps[:] = self._steps
        if not self._clocks_agree:
            rows.ends[:] = 0
        self._outstanding.count_into(rows.counts)
        return ArrayWork(rows, self._models, now_ns, self._lockstep, self._prepared)
