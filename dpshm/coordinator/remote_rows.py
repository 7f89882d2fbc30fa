"""Rows of engines on other nodes: what an engine says of itself is written to its row of this node's board.

A message carries the engine's whole row, so the newest one counts and each may be lost. It says how much the
engine has received from each front-end, as of the same moment as its queue. So a booking that is on its way is
kept, however old the row is: ``received`` grows by what was received, and by nothing else.

    received[engine, front-end] = base + what the engine says it has received since it started

The base is on the board. It is chosen so that nothing is on its way when a process is heard for the first time, as
where an engine attaches to its board, and it stays for as long as the process and the front-end's name stay. So a
message may be lost or repeated, and a coordinator that takes the board over goes on where the last one was.

Times are of this node's clock: `heard` is when a message came, and the begin and end of a step are as far from it
as they were, at the engine, from the moment of the message. No clocks of two nodes are compared.

A process that was replaced by another in the same rank is never heard again: its messages may come late.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

from dpshm.board import layout
from dpshm.board.layout import CARRIED_WORDS, REMOTE_WORDS, STEP_WORDS
from dpshm.board.words import COUNT_MASK, queued
from dpshm.errors import WireError
from dpshm.linux import processes
from dpshm.rules.liveness import Verdict

if TYPE_CHECKING:
    from dpshm.board.board import Board
    from dpshm.coordinator.row import CoordinatorRow
    from dpshm.net import wire

logger = logging.getLogger(__name__)

REPLACED_KEPT = 16
"""So many processes that had a rank are remembered."""
LOCK_TEST_NS = 100_000_000
"""For so long a row that no process of this node held counts as free."""
_LOAD, _PID = CARRIED_WORDS.index(("load", 0)), CARRIED_WORDS.index(("engine_pid", 0))
_BACKLOG = CARRIED_WORDS.index(("prefill_backlog", 0))
_TIMES = CARRIED_WORDS.index(("step_start", 0)), CARRIED_WORDS.index(("step_model", STEP_WORDS.index("step_end")))


class _Places:
    """Where the words of one rank are."""

    def __init__(self, board: Board, e: int) -> None:
        self.carried = [board.index(name, e, item) for name, item in CARRIED_WORDS]
        self.heard, self.report, self.process = (
            board.index("remote_state", e, REMOTE_WORDS.index(name))
            for name in ("heard", "heard_report", "heard_process")
        )
        self.beat = board.index("beat", e)
        self.request_offset, self.token_offset = board.index("request_offset", e), board.index("token_offset", e)
        self.received_requests, self.base_requests = (
            board.index(name, e) for name in ("received_requests", "base_requests")
        )
        self.received_tokens, self.base_tokens = (
            board.index(name, e) for name in ("received_tokens", "base_tokens")
        )


class RemoteRows:
    """Writes rows of engines on other nodes. Used in the wave thread alone."""

    def __init__(self, board: Board, row: CoordinatorRow) -> None:
        self._board = board
        self._row = row
        self._places: dict[int, _Places] = {}
        self._replaced: dict[int, deque[int]] = {}
        self._lock_tested_ns: dict[int, int] = {}
        self._frontends: dict[str, int] = {}
        self._seen_frontends = -1
        # By rank: which front-end each row is known to be, and what the newest message said of each front-end.
        self._named: dict[int, dict[int, str | int]] = {}
        self._said: dict[int, dict[str | int, tuple[int, int]]] = {}

    def report(self, e: int, message: wire.RemoteRow, now_ns: int) -> None:
        """Writes what an engine says to its row.

        Args:
            e: the rank.
            message: from it.
            now_ns: CLOCK_MONOTONIC at which it came.

        Raises:
            WireError: a process of this node has that row.
        """
        board, words = self._board, self._board.words
        if not self._is_free(e, now_ns):
            raise WireError(f"from rank {e} on another node, and a process of this node is that rank")
        if message.process in self._replaced.get(e, ()):
            return
        at = self._places.get(e) or self._places.setdefault(e, _Places(board, e))
        if words[at.process] != message.process:
            if not message.here:
                return
            self._begin(e, at, message)
        elif message.report < words[at.report]:
            return  # it came over a connection that has been replaced
        remote = self._row.is_remote(e)
        repeated = remote and words[at.report] == message.report
        words[at.report] = message.report
        words[at.heard] = now_ns
        if not repeated:
            self._store(e, at, message, now_ns)
        self._mark(e, remote, message)

    def _is_free(self, e: int, now_ns: int) -> bool:
        """Whether no process of this node holds the row. Asked seldom: it is a system call."""
        tested_ns = self._lock_tested_ns.get(e)
        if tested_ns is not None and now_ns - tested_ns < LOCK_TEST_NS:
            return True
        if self._board.engine_alive(e):
            return False
        self._lock_tested_ns[e] = now_ns
        return True

    def _begin(self, e: int, at: _Places, message: wire.RemoteRow) -> None:
        """Begins a row anew, as an engine that attaches does (`dpshm.engine.row`)."""
        board, words = self._board, self._board.words
        if before := words[at.process]:
            self._replaced.setdefault(e, deque(maxlen=REPLACED_KEPT)).append(before)
        incarnation = words[board.index("engine_incarnation", e)] & COUNT_MASK
        words[board.index("engine_pid", e)] = 0
        for name in ("load", *layout.ENGINE_WORDS):
            if name != "engine_incarnation":
                words[board.index(name, e)] = 0
        for name, items in (("step_model", layout.STEP_MODEL_WORDS), ("cache_state", layout.CACHE_WORDS)):
            for i in range(len(items)):
                words[board.index(name, e, i)] = 0
        for f in range(board.frontends):
            words[at.received_tokens + f] = words[board.index("sent_tokens", f, e)] & COUNT_MASK
            words[at.received_requests + f] = words[board.index("sent_requests", f, e)] & COUNT_MASK
        board.nothing_outstanding(e)
        self._named[e], self._said[e] = {}, _said(message)
        words[board.index("engine_time_namespace", e)] = processes.namespace_inode("time")
        words[at.report] = 0
        words[board.index("engine_incarnation", e)] = incarnation + 1
        # SYNC: last: a coordinator that takes over between these stores begins the row once more.
        words[at.process] = message.process

    def _store(self, e: int, at: _Places, message: wire.RemoteRow, now_ns: int) -> None:
        words, values = self._board.words, message.words
        for i in _TIMES:
            if values[i]:
                values[i] = max(1, now_ns - message.clock_ns + values[i])
        if not message.here:  # as an engine leaves: in good order, with nothing queued
            for i in (_PID, _LOAD, _BACKLOG, *_TIMES):
                values[i] = 0
        self._store_received(e, at, message)
        # SYNC: in the engine's place. `received` comes first, as at an engine (`EngineRow.receive`): what is
        # outstanding is the sum of an offset, which is one word, and of what was sent; `received` is no part.
        frontends = self._board.frontends
        requests = sum(words[at.received_requests : at.received_requests + frontends])
        tokens = sum(words[at.received_tokens : at.received_tokens + frontends])
        words[at.request_offset] = queued(values[_LOAD]) - requests
        words[at.token_offset] = min(values[_BACKLOG], COUNT_MASK) - tokens
        for place, value in zip(at.carried, values, strict=True):
            words[place] = value
        words[at.beat] = now_ns

    def _store_received(self, e: int, at: _Places, message: wire.RemoteRow) -> None:
        words, named, before = self._board.words, self._named.setdefault(e, {}), self._said.get(e)
        said = self._said[e] = _said(message)
        for frontend, (requests, tokens) in said.items():
            f = self._row_of(frontend)
            if f is None:
                continue
            if named.get(f) != frontend:
                if before is not None:  # else another coordinator has stored the base
                    earlier = before.get(frontend, (0, 0))
                    words[at.base_requests + f] = words[at.received_requests + f] - earlier[0]
                    words[at.base_tokens + f] = words[at.received_tokens + f] - earlier[1]
                named[f] = frontend
            # SYNC: tokens, then requests, as the engine stores them (`EngineRow.receive`).
            words[at.received_tokens + f] = max(0, min(words[at.base_tokens + f] + tokens, COUNT_MASK))
            words[at.received_requests + f] = max(0, min(words[at.base_requests + f] + requests, COUNT_MASK))

    def _row_of(self, frontend: str | int) -> int | None:
        """The row of a front-end on this board; None while it has none."""
        board = self._board
        if isinstance(frontend, int):
            return frontend if frontend < board.frontends else None
        seen = int(board.frontend_incarnation.sum())
        if seen != self._seen_frontends:
            self._seen_frontends = seen
            # Of rows with one name, that of the process that lives.
            rows = sorted(
                range(board.frontends_used()),
                key=lambda f: (bool(board.frontend_pid[f]), self._row.frontend_verdict(f) is not Verdict.DEAD),
            )
            self._frontends = {board.owner_of(f): f for f in rows}
        return self._frontends.get(frontend)

    def _mark(self, e: int, remote: bool, message: wire.RemoteRow) -> None:
        before = self._row.engine_verdict(e)
        if not message.here:
            self._row.set_engine(e, verdict=Verdict.ABSENT, on_behalf=False, remote=True)
        elif not remote or before in (Verdict.ABSENT, Verdict.DEAD, Verdict.UNKNOWN):
            self._row.set_engine(e, verdict=Verdict.ALIVE, on_behalf=False, remote=True)
            logger.info(
                "engine %d (pid %d) is heard on another node, was %s", e, message.words[_PID], before.name.lower()
            )


def _said(message: wire.RemoteRow) -> dict[str | int, tuple[int, int]]:
    return {received.frontend: (received.requests, received.tokens) for received in message.received}
