"""Stock engines on the board: what vLLM's own engines report is written to their rows on their behalf.

A stock engine knows no board. It has no lock, so it gets no verdict but *alive*, and its row shows its queues and
not whether it steps. An engine that has taken its row writes the row itself; its reports are then not heeded.

A report alone proves that a stock engine is there: a connection does not say whose it is. The mark on behalf
stays while the engine's connection does. If fewer stock engines are connected than marked, it is not known which
one left: all these marks go, and the next report of each engine brings its mark back.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from dpshm.board.words import ON_BEHALF, VERDICT_MASK, pack_load, pack_progress, unpack_load
from dpshm.coordinator.connections import Connections
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
GONE_NS = 100_000_000
"""For so long a connection must be missing: a report may come before its sender's subscription."""


class StockEngines:
    """Writes reports to a board, and remembers their counts step by step. Used in the wave thread alone.

    Attributes:
        connections: of the engines.
    """

    def __init__(self, board: Board, row: CoordinatorRow) -> None:
        self._board = board
        self._row = row
        self._counts = StepCounts()
        self.connections = Connections()
        self._missing = Lasting(GONE_NS)
        self._missing_from_ns = time.monotonic_ns() + RETURN_NS

    def report(self, e: int, stats: wire.SchedulerStats, now_ns: int) -> SeenRunning | None:
        """Writes a report to the engine's row; an event if the report shows the engine running.

        The engines of August 2025 confirm no START in words: in a wake-up, that event does.
        """
        board, words = self._board, self._board.words
        if board.engine_pid[e] or board.engine_alive(e):
            # The engine writes its own row; a last report of one that died does not make it a stock engine.
            return None
        waiting, running, kv = stats.num_waiting_reqs, stats.num_running_reqs, stats.kv_cache_usage
        if not self._counts.report(e, stats.current_wave, stats.step_counter, (waiting, running, kv)):
            logger.debug("engine %d reported step %d late", e, stats.step_counter)
        # SYNC: on a stock engine's behalf, in the order in which an engine stores it (`EngineRow.publish`).
        # The report does not say what the engine has received, so all that was sent by now counts as received.
        used = board.frontends_used()
        sent_requests = board.sent_requests[:, e].tolist()
        sent_tokens = board.sent_tokens[:, e].tolist()
        words[board.index("load", e)] = pack_load(waiting, running, kv)
        words[board.index("request_offset", e)] = waiting + running - sum(sent_requests[:used])
        words[board.index("token_offset", e)] = -sum(sent_tokens[:used])
        at_tokens, at_requests = board.index("received_tokens", e), board.index("received_requests", e)
        for f in range(used):
            words[at_tokens + f] = sent_tokens[f]
            words[at_requests + f] = sent_requests[f]
        words[board.index("progress", e)] = pack_progress(stats.current_wave, stats.step_counter)
        words[board.index("beat", e)] = now_ns
        self._row.set_engine(e, verdict=Verdict.ALIVE, on_behalf=True)
        return SeenRunning(e, stats.current_wave) if running else None

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

    def _marked(self) -> list[int]:
        return [e for e in range(self._board.dp_size) if self._row.is_stock(e)]

    def _connected(self) -> int:
        if self.connections.nameless <= 0:
            return 0
        return self.connections.stock([self._holds_row(e) for e in range(self._board.dp_size)])

    def _holds_row(self, e: int) -> bool:
        """Whether the engine writes its row itself, as its mark says."""
        mark = self._row.engine(e)
        return mark & VERDICT_MASK in (Verdict.ALIVE, *HANGING) and not mark & ON_BEHALF

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
