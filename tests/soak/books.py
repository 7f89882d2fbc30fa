"""The sums over a soak's ledger and board: every request sent is completed, or lost for a known reason.

They are checked while all processes live and no message is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from dpshm import Board
from tests.soak.frontends import WINDOW
from tests.soak.group import SoakGroup
from tests.soak.members import UNTOUCHED, Member
from tests.support import outstanding


class Books:
    """What all processes, the dead too, have counted."""

    def __init__(self, group: SoakGroup) -> None:
        self._ledger = group.ledger
        self._engines, self._frontends, self._readers = group.engines, group.frontends, group.readers
        self._problems: list[str] = []

    def totals(self) -> dict[str, int]:
        """Over all lives."""
        engines = [life for m in self._engines for life in m.lives]
        frontends = [life for m in self._frontends for life in m.lives]
        ended = [life for m in self._frontends for life in m.killed]
        return {
            **{name: self._sum(name, frontends) for name in ("sent", "refused", "completed")},
            "lost_with_their_engine": self._sum("lost", frontends),
            "lost_with_their_frontend": sum(map(self._out, ended)),
            "no_engine": sum(self._ledger.get(life, "no_engine") for life in frontends),
            "finished": sum(self._ledger.get(life, "finished") for life in engines),
            "undeliverable": sum(self._ledger.get(life, "undeliverable") for life in engines),
            "reads": sum(self._ledger.get(life, "attempted") for m in self._readers for life in m.lives),
        }

    def check(self, board: Board) -> list[str]:
        """What does not add up."""
        rows = board.snapshot()
        self._check_rest(rows)
        for engine in self._engines:
            finished = self._ledger.get(engine.life, "finished")
            if engine.role == "engine":
                shown = int(rows["requests_finished"][engine.slot])
                self._expect(f"{engine}: requests_finished", shown, finished)
                self._check_sums(board, engine)
            self._expect(f"{engine}: taken in", self._sum("taken", [engine.life]), finished)
            for frontend in self._frontends:
                self._check_bookings(board, engine, frontend)
        for frontend in self._frontends:
            for life in frontend.lives:
                self._check_life(frontend, life)
        for life in (life for reader in self._readers for life in reader.lives):
            self._expect("reads that are not possible", self._ledger.get(life, "unexpected"), 0)
        for engine in self._engines[:UNTOUCHED]:
            for frontend in self._frontends:
                self._check_pair(engine, frontend)
        return self._problems

    def _check_rest(self, rows: npt.NDArray[Any]) -> None:
        """Nothing is in flight, waiting or running."""
        for name in ("in_flight", "in_flight_tokens", "prefill_backlog"):
            self._expect(f"{name} by rank", rows[name].tolist(), [0] * len(rows))
        # A stock engine reports what changed and no more: a report that died with a coordinator is not repeated.
        own = [engine.slot for engine in self._engines if engine.role == "engine"]
        for name in ("waiting", "running"):
            self._expect(f"{name} by rank", rows[name][own].tolist(), [0] * len(own))

    def _check_sums(self, board: Board, engine: Member) -> None:
        """An engine's sums are exactly 0: a snapshot shows no count below that."""
        left = outstanding(board)[:, engine.slot].tolist()
        self._expect(f"{engine}: requests and tokens outstanding", left, [0, 0])

    def _sum(self, name: str, lives: Sequence[int]) -> int:
        return sum(sum(self._ledger.by_peer(life, name)) for life in lives)

    def _out(self, life: int) -> int:
        """What a front-end has sent and heard nothing of."""
        return self._sum("sent", [life]) - self._sum("completed", [life]) - self._sum("lost", [life])

    def _expect(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            self._problems.append(f"{what}: {found}, expected {expected}")

    def _check_bookings(self, board: Board, engine: Member, frontend: Member) -> None:
        e, f = engine.slot, self._ledger.get(frontend.life, "index")
        for kind, sent, received in (
            ("requests", board.sent_requests, board.received_requests),
            ("tokens", board.sent_tokens, board.received_tokens),
        ):
            self._expect(f"{frontend} to {engine}: {kind} received", int(received[e, f]), int(sent[f, e]))

    def _check_life(self, frontend: Member, life: int) -> None:
        """Sent = completed + lost with their engines + outstanding requests of front-ends that were killed."""
        ledger, out = self._ledger, self._out(life)
        if life not in frontend.killed:
            self._expect(f"{frontend}: sent and without an answer", out, 0)
            tried = self._sum("sent", [life]) + self._sum("refused", [life])
            self._expect(f"{frontend}: sent or refused", tried, ledger.get(life, "attempted"))
        elif not 0 <= out <= WINDOW + 1:
            self._problems.append(
                f"{frontend}, life {life}: died with {out} out, and never had more than {WINDOW}"
            )
        self._expect(f"{frontend}: answers to nothing", ledger.get(life, "unexpected"), 0)
        lost = ledger.by_peer(life, "lost")[:UNTOUCHED]
        self._expect(f"{frontend}: lost at engines that were never killed", lost, [0] * UNTOUCHED)

    def _check_pair(self, engine: Member, frontend: Member) -> None:
        """What was sent to an engine that always lived has all come in; each killed front-end may owe one."""
        sent = sum(self._ledger.by_peer(life, "sent")[engine.slot] for life in frontend.lives)
        taken = self._ledger.by_peer(engine.life, "taken")[frontend.slot]
        if not taken <= sent <= taken + len(frontend.killed):
            self._expect(
                f"{engine}: taken in from {frontend}, which ended {len(frontend.killed)} times", taken, sent
            )
