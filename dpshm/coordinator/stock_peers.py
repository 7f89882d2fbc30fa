"""Stock engines on the board: what vLLM's own engines report is written to their rows on their behalf.

A stock engine knows no board. Its report does not say what it has received, so a booking counts as received some
time after it was made (`dpshm.coordinator.sent_log`): a report erases no booking that is in flight.

It has no lock, so it gets no verdict but *alive*, and its row shows its queues and not whether it steps. An engine
that has taken its row writes the row itself; its reports are then not heeded.

A report proves that a stock engine is there: a connection does not say whose it is. A dense engine reports only
after a step, so before its first request a front-end's word counts too: it has a live connection to that very
rank. The word counts only if there is a nameless connection for each rank that is marked or named. So a connection
that a forked worker keeps stands for no rank of which no front-end has heard.

The mark on behalf stays while the engine's connection does. If fewer stock engines are connected than marked, it
is not known which one left: all these marks go, and the next report of each engine, or the next word of a
front-end, brings its mark back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpshm.board.words import ON_BEHALF, VERDICT_MASK, pack_load, pack_progress, queued, unpack_load
from dpshm.coordinator.connections import Connections
from dpshm.coordinator.sent_log import Sample, SentLog
from dpshm.coordinator.step_counts import RankCounts, StepCounts
from dpshm.net import wire
from dpshm.rules.liveness import HANGING, Verdict
from dpshm.rules.reconciler import Lasting
from dpshm.rules.waves import SeenRunning

if TYPE_CHECKING:
    from dpshm.board.board import Board
    from dpshm.coordinator.row import CoordinatorRow

logger = logging.getLogger(__name__)


RETURN_NS = 5_000_000_000
"""Within this time engines connect again, after a coordinator was replaced or ended every connection."""
LOOK_NS = 50_000_000
"""Interval between looks at what was sent, while bookings at stock engines do not count as received."""
GONE_NS = 100_000_000
"""For so long a connection must be missing: a report may come before its sender's subscription."""


class StockEngines:
    """Writes reports to a board, and remembers their counts step by step. Used in the wave thread alone.

    Attributes:
        connections: of the engines.
        due_ns: when `on_time` is to be called next; None if it need not be.
    """

    def __init__(self, board: Board, row: CoordinatorRow) -> None:
        self._board = board
        self._row = row
        self._counts = StepCounts()
        self._sent = SentLog()
        self.due_ns: int | None = 0  # at once: the last coordinator may have left bookings
        self.connections = Connections()
        self._missing = Lasting(GONE_NS)
        self._missing_from_ns = time.monotonic_ns() + RETURN_NS

    def report(self, e: int, stats: wire.SchedulerStats, now_ns: int) -> SeenRunning | None:
        """Writes a report to the engine's row; an event if the report shows the engine running.

        The engines of August 2025 confirm no START in words: in a wake-up, that event does.
        """
        board, words = self._board, self._board.words
        unknown = self._row.is_remote(e) and self._row.engine_verdict(e) is Verdict.UNKNOWN
        if (board.engine_pid[e] and not unknown) or board.engine_alive(e):
            # The engine writes its own row; a last report of one that died does not make it a stock engine.
            return None
        waiting, running, kv = stats.num_waiting_reqs, stats.num_running_reqs, stats.kv_cache_usage
        if not self._counts.report(e, stats.current_wave, stats.step_counter, (waiting, running, kv)):
            logger.debug("engine %d reported step %d late", e, stats.step_counter)
        words[board.index("load", e)] = pack_load(waiting, running, kv)
        self._receive(e, self._look(now_ns))
        words[board.index("progress", e)] = pack_progress(stats.current_wave, stats.step_counter)
        words[board.index("beat", e)] = now_ns
        self._row.set_engine(e, verdict=Verdict.ALIVE, on_behalf=True, remote=False)
        if self.due_ns is None:
            self.due_ns = now_ns + LOOK_NS
        return SeenRunning(e, stats.current_wave) if running else None

    def heard(self, dp_ranks: Sequence[int], now_ns: int) -> None:
        """A front-end has live connections to these ranks: those that are not there yet are idle stock engines."""
        board, row, marked = self._board, self._row, self._marked()
        unmarked = set(self._unwritten()).difference(marked)
        new = [e for e in dp_ranks if e in unmarked and not board.engine_alive(e)]
        if not new or self._connected() < len(marked) + len(new):
            return
        for e in new:
            board.words[board.index("load", e)] = pack_load(0, 0, 0.0)
            self._receive(e, self._look(now_ns))
            board.words[board.index("beat", e)] = now_ns
            row.set_engine(e, verdict=Verdict.ALIVE, on_behalf=True, remote=False)
        if self.due_ns is None:
            self.due_ns = now_ns + LOOK_NS

    def on_time(self, now_ns: int) -> None:
        """Time has passed: bookings that are old enough count as received, also without a report."""
        if self.due_ns is None or now_ns < self.due_ns:
            return
        self.due_ns = None
        sample = self._look(now_ns)
        for e in self._unwritten():
            if not self._board.engine_alive(e):
                self._receive(e, sample)
        self._wait_for_bookings(now_ns)

    def _look(self, now_ns: int) -> Sample | None:
        used = self._board.frontends_used()
        return self._sent.look(self._board.sent_requests[:used], self._board.sent_tokens[:used], now_ns)

    def _receive(self, e: int, sample: Sample | None) -> None:
        """Stores what a stock engine has received as far as can be known, and its offsets."""
        board, words = self._board, self._board.words
        at_tokens, at_requests = board.index("received_tokens", e), board.index("received_requests", e)
        # SYNC: on a stock engine's behalf, in the order in which an engine stores it (`EngineRow.receive`):
        # tokens, then requests. What is outstanding is an offset, which is one word, and what was sent.
        for f in range(len(sample.requests) if sample is not None else 0):
            assert sample is not None
            # A front-end that started since may have sent less than the row's holder before it.
            for at, then, now in (
                (at_tokens + f, sample.tokens[f, e], board.sent_tokens[f, e]),
                (at_requests + f, sample.requests[f, e], board.sent_requests[f, e]),
            ):
                words[at] = max(words[at], int(min(then, now)))
        words[board.index("request_offset", e)] = queued(words[board.index("load", e)]) - int(
            board.received_requests[e].sum()
        )
        words[board.index("token_offset", e)] = -int(board.received_tokens[e].sum())

    def _wait_for_bookings(self, now_ns: int) -> None:
        """Asks for another look if bookings at stock engines do not count as received yet."""
        board, used = self._board, self._board.frontends_used()
        ranks = self._unwritten()
        if (board.sent_requests[:used, ranks] > board.received_requests[ranks, :used].T).any():
            self.due_ns = now_ns + LOOK_NS

    def count(self) -> int:
        """How many stock engines there are, those that have not reported yet among them."""
        return max(len(self._marked()), self._connected())

    def on_disconnect(self, now_ns: int) -> None:
        """Every connection was ended; engines that live connect again."""
        self._missing_from_ns = now_ns + RETURN_NS

    def drop_unconnected(self, now_ns: int) -> None:
        """Drops the marks on behalf of stock engines if one of them is not connected any more."""
        marked = self._marked()
        missing = bool(marked) and now_ns >= self._missing_from_ns and self._connected() < len(marked)
        if self._missing.holds(now_ns, missing):
            logger.warning("of the stock engines %s one is gone: each is left out until it reports again", marked)
            for e in filter(self._row.is_stock, marked):  # an engine may have taken its row meanwhile
                self._row.set_engine(e, verdict=Verdict.ABSENT, on_behalf=False)
            self._wait_for_bookings(now_ns)

    def _unwritten(self) -> list[int]:
        """The ranks whose rows no engine writes: the stock ones, and those that left or are left out.

        Bookings that are in flight to a rank that is left out are received or lost; no report will tell.
        """
        board = self._board
        ranks = (e for e in range(board.dp_size) if not board.engine_pid[e])
        return [e for e in ranks if not self._row.is_remote(e) and not self._holds_row(e)]

    def _marked(self) -> list[int]:
        return [e for e in range(self._board.dp_size) if self._row.is_stock(e)]

    def _connected(self) -> int:
        if self.connections.nameless <= 0:
            return 0
        return self.connections.stock([self._holds_row(e) for e in range(self._board.dp_size)])

    def _holds_row(self, e: int) -> bool:
        """Whether the engine writes its row itself, as its mark says."""
        mark = self._row.engine(e)
        there = Verdict.ALIVE, Verdict.UNKNOWN, *HANGING
        return mark & VERDICT_MASK in there and not mark & ON_BEHALF

    def counts(self) -> list[RankCounts]:
        """By rank: a stock engine's last complete step, or what another engine has on the board."""
        reported = self._counts.next_to_publish()
        return [
            reported[e] if e in reported and self._row.is_stock(e) else unpack_load(word)
            for e, word in enumerate(self._board.load[: self._board.dp_size].tolist())
        ]

    def keep_only(self, dp_size: int) -> None:
        """Forgets the reports of ranks from `dp_size` on."""
        self._counts.keep_only(dp_size)

    def forget(self) -> None:
        """Forgets all reports: the engines that come next count waves and steps from 0."""
        self._counts = StepCounts()
