"""Stock engines on the board: what vLLM's own engines report is written to their rows on their behalf.

A stock engine knows no board. It has no lock, so it gets no verdict but *alive*, and its row shows its queues and
not whether it steps. An engine that has taken its row writes the row itself; its reports are then not heeded.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dpshm.board.words import pack_load, pack_progress, unpack_load
from dpshm.coordinator.step_counts import RankCounts, StepCounts
from dpshm.net import wire
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import SeenRunning

if TYPE_CHECKING:
    from dpshm.board.board import Board
    from dpshm.coordinator.row import CoordinatorRow

logger = logging.getLogger(__name__)


class StockEngines:
    """Writes reports to a board, and remembers their counts step by step. Used in the wave thread alone."""

    def __init__(self, board: Board, row: CoordinatorRow) -> None:
        self._board = board
        self._row = row
        self._counts = StepCounts()

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

    def mark_missing_rows(self) -> None:
        """Marks every rank whose row was never taken as a stock engine: for when all ranks are connected."""
        board = self._board
        for e in range(board.dp_size):
            if not board.engine_incarnation[e] and not board.engine_alive(e):
                self._row.set_engine(e, verdict=Verdict.ALIVE, on_behalf=True)

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
