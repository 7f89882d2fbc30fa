"""Rows of engines on other nodes: what an engine says of itself is written to its row of this node's board.

A message carries the engine's whole row, so the newest one counts and each may be lost. It says how much the
engine has received from each front-end, as of the same moment as its queue. So a booking that is in flight is
kept, however old the row is: ``received`` grows by what was received, and by nothing else.

    received[engine, front-end] = base + what the engine says it has received since it started

The base is on the board. It is chosen so that nothing is in flight when a process is heard for the first time, as
where an engine attaches to its board, and it stays for as long as the process and the front-end's name stay. So a
message may be lost or repeated, and a coordinator that takes the board over goes on where the last one was.

Times are of this node's clock: `heard` is when a message came, and the begin and end of a step are as far from it
as they were, at the engine, from the moment of the message. No clocks of two nodes are compared.

A process that was replaced by another in the same rank is never heard again: its messages may come late.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from dpshm.board import layout
from dpshm.board.carried import carried_places
from dpshm.board.layout import CARRIED_WORDS, REMOTE_WORDS, STEP_WORDS
from dpshm.board.words import COUNT_MASK, VERDICT_MASK, queued
from dpshm.coordinator.holders import Holders
from dpshm.errors import WireError
from dpshm.linux import processes
from dpshm.net import wire
from dpshm.rules.liveness import Verdict

if TYPE_CHECKING:
    from dpshm.board.board import Board
    from dpshm.coordinator.row import CoordinatorRow

logger = logging.getLogger(__name__)

_LOAD, _PID = CARRIED_WORDS.index(("load", 0)), CARRIED_WORDS.index(("engine_pid", 0))
_BACKLOG = CARRIED_WORDS.index(("prefill_backlog", 0))
_GONE = (Verdict.ABSENT, Verdict.DEAD, Verdict.UNKNOWN)
_TIMES = CARRIED_WORDS.index(("step_start", 0)), CARRIED_WORDS.index(("step_model", STEP_WORDS.index("step_end")))


class _Rank:
    """Where the words of one rank are, and what this coordinator has stored there.

    Attributes:
        incarnation: of the row that what follows is of; None: it is not known.
        received: what the newest message said of front-ends, as it came; None where it has to be read again.
        said: the same by front-end.
        named: which front-end each row is known to be.
        totals: requests and tokens received from all.
    """

    def __init__(self, board: Board, e: int) -> None:
        self.carried = carried_places(board, e)
        self.heard, self.report, self.process = (
            board.index("remote_state", e, REMOTE_WORDS.index(name))
            for name in ("heard", "heard_report", "heard_process")
        )
        self.beat, self.engine_incarnation = board.index("beat", e), board.index("engine_incarnation", e)
        self.request_offset, self.token_offset = board.index("request_offset", e), board.index("token_offset", e)
        self.received_requests, self.base_requests = (
            board.index(name, e) for name in ("received_requests", "base_requests")
        )
        self.received_tokens, self.base_tokens = (
            board.index(name, e) for name in ("received_tokens", "base_tokens")
        )
        self.named: dict[int, str | int] = {}
        self.said: dict[str | int, tuple[int, int]] | None = None
        self.forget()

    def forget(self) -> None:
        """What was stored is not known: another process may have written the row."""
        self.incarnation: int | None = None
        self.received: msgspec.Raw | None = None
        self.totals = 0, 0


class RemoteRows:
    """Writes rows of engines on other nodes. Used in the wave thread alone."""

    def __init__(self, board: Board, row: CoordinatorRow) -> None:
        self._board = board
        self._row = row
        self._ranks: dict[int, _Rank] = {}
        self._holders = Holders(board)
        self._frontends: dict[str, int] = {}
        self._seen_frontends = -1

    def report(self, e: int, message: wire.RemoteRow, now_ns: int) -> None:
        """Writes what an engine says to its row.

        Args:
            e: the rank.
            message: from it.
            now_ns: CLOCK_MONOTONIC at which it came.

        Raises:
            WireError: a process of this node has that row, or the message is none.
        """
        words = self._board.words
        at = self._ranks.get(e) or self._ranks.setdefault(e, _Rank(self._board, e))
        # All of a message is read before anything is stored.
        values = list(wire.unpack_words(message.words))
        received = None if message.received == at.received else wire.unpack_received(message)
        if not self._holders.is_free(e, now_ns):
            raise WireError(f"from rank {e} on another node, and a process of this node is that rank")
        if self._holders.was_replaced(e, message.process):
            return
        if words[at.process] != message.process:
            if not message.here:
                return
            self._begin(e, at, message)
        elif message.report < words[at.report]:
            return  # it came over a connection that has been replaced
        remote = self._row.is_remote(e)
        if not remote or words[at.engine_incarnation] != at.incarnation:
            at.forget()
        repeated = remote and words[at.report] == message.report
        words[at.report] = message.report
        words[at.heard] = now_ns
        if not repeated:
            if received is None and at.received is None:
                received = wire.unpack_received(message)
            self._store(at, message, values, received, now_ns)
            at.incarnation = words[at.engine_incarnation]
        self._mark(e, remote, message, values)

    def _begin(self, e: int, at: _Rank, message: wire.RemoteRow) -> None:
        """Begins a row anew, as an engine that attaches does (`dpshm.engine.row`)."""
        board, words = self._board, self._board.words
        self._holders.replace(e, words[at.process])
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
        at.forget()
        at.named, at.said = {}, _said(wire.unpack_received(message))
        words[board.index("engine_time_namespace", e)] = processes.namespace_inode("time")
        words[at.report] = 0
        words[board.index("engine_incarnation", e)] = incarnation + 1
        # SYNC: last: a coordinator that takes over between these stores begins the row once more.
        words[at.process] = message.process

    def _store(
        self,
        at: _Rank,
        message: wire.RemoteRow,
        values: list[int],
        received: list[wire.Received] | None,
        now_ns: int,
    ) -> None:
        words = self._board.words
        for i in _TIMES:
            if values[i]:
                values[i] = max(1, now_ns - message.clock_ns + values[i])
        if not message.here:  # as an engine leaves: in good order, with nothing queued
            for i in (_PID, _LOAD, _BACKLOG, *_TIMES):
                values[i] = 0
        if received is not None:
            all_known = self._store_received(at, received)
            at.received = message.received.copy() if all_known else None
        # SYNC: in the engine's place. `received` comes first, as at an engine (`EngineRow.receive`): what is
        # outstanding is the sum of an offset, which is one word, and of what was sent; `received` is no part.
        words[at.request_offset] = queued(values[_LOAD]) - at.totals[0]
        words[at.token_offset] = min(values[_BACKLOG], COUNT_MASK) - at.totals[1]
        for place, value in zip(at.carried, values, strict=True):
            words[place] = value
        words[at.beat] = now_ns

    def _store_received(self, at: _Rank, received: list[wire.Received]) -> bool:
        """Stores what was received from each front-end; whether all of them have a row here."""
        words, named, before = self._board.words, at.named, at.said
        all_requests, all_tokens = self._all_received(at) if at.incarnation is None else at.totals
        said = at.said = _said(received)
        rows = self._rows(said)
        for (frontend, (requests, tokens)), f in zip(said.items(), rows, strict=True):
            if f is None:
                continue
            if named.get(f) != frontend:
                if before is not None:  # else another coordinator has stored the base
                    earlier = before.get(frontend, (0, 0))
                    words[at.base_requests + f] = words[at.received_requests + f] - earlier[0]
                    words[at.base_tokens + f] = words[at.received_tokens + f] - earlier[1]
                named[f] = frontend
            # SYNC: tokens, then requests, as the engine stores them (`EngineRow.receive`).
            value = max(0, min(words[at.base_tokens + f] + tokens, COUNT_MASK))
            all_tokens += value - words[at.received_tokens + f]
            words[at.received_tokens + f] = value
            value = max(0, min(words[at.base_requests + f] + requests, COUNT_MASK))
            all_requests += value - words[at.received_requests + f]
            words[at.received_requests + f] = value
        at.totals = all_requests, all_tokens
        return None not in rows

    def _all_received(self, at: _Rank) -> tuple[int, int]:
        words, frontends = self._board.words, self._board.frontends
        ends = ((begin, begin + frontends) for begin in (at.received_requests, at.received_tokens))
        requests, tokens = (sum(words[begin:end]) for begin, end in ends)
        return requests, tokens

    def _rows(self, frontends: Collection[str | int]) -> list[int | None]:
        """The row of each front-end on this board; None while it has none."""
        board = self._board
        if any(isinstance(f, str) for f in frontends) and (
            (seen := int(board.frontend_incarnation.sum())) != self._seen_frontends
        ):
            self._seen_frontends = seen
            # Of rows with one name, that of the process that lives.
            rows = sorted(
                range(board.frontends_used()),
                key=lambda f: (bool(board.frontend_pid[f]), self._row.frontend_verdict(f) is not Verdict.DEAD),
            )
            self._frontends = {board.owner_of(f): f for f in rows}
        return [
            (f if f < board.frontends else None) if isinstance(f, int) else self._frontends.get(f)
            for f in frontends
        ]

    def _mark(self, e: int, remote: bool, message: wire.RemoteRow, values: Sequence[int]) -> None:
        before = self._row.engine(e) & VERDICT_MASK
        if not message.here:
            self._row.set_engine(e, verdict=Verdict.ABSENT, on_behalf=False, remote=True)
        elif not remote or before in _GONE:
            self._row.set_engine(e, verdict=Verdict.ALIVE, on_behalf=False, remote=True)
            logger.info(
                *("engine %d (pid %d) is heard on another node, was %s", e, values[_PID]),
                Verdict(before).name.lower(),
            )


def _said(received: Iterable[wire.Received]) -> dict[str | int, tuple[int, int]]:
    return {of_one.frontend: (of_one.requests, of_one.tokens) for of_one in received}
