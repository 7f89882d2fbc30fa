"""The coordinator's marks: one word an engine and one a front-end, written by whichever of its threads knows.

The wave thread knows stock engines, the watch thread verdicts, an operator what is drained. All three are
parts of one word, so a lock keeps the threads of this process from losing each other's part.

Every change ends with a step of the board's `revision`, the one word that a front-end reads in each decision
to know that its list of engines is still right. The newest changes stay on the board, each with its time, in a
ring that the revision counts: whoever looks later finds what happened while nobody did.
"""

from __future__ import annotations

import threading
import time

from dpshm.board import layout
from dpshm.board.board import Board
from dpshm.board.words import COUNT_MASK, DRAINED, ON_BEHALF, VERDICT_MASK, ChangeKind, pack_change
from dpshm.rules.liveness import Verdict


class Marks:
    """Reads and changes the marks of a board that this process's coordinator owns."""

    def __init__(self, board: Board) -> None:
        self._words = board.words
        self._at_engine = board.index("engine_mark")
        self._at_frontend = board.index("frontend_mark")
        self._at_dp_size = board.index("dp_size")
        self._at_revision = board.index("revision")
        self._at_epoch = board.index("epoch")
        self._at_change = board.index("change")
        self._at_change_time = board.index("change_time")
        self._lock = threading.Lock()

    def engine(self, dp_rank: int) -> int:
        """An engine's mark."""
        return self._words[self._at_engine + dp_rank]

    def engine_verdict(self, dp_rank: int) -> Verdict:
        """The verdict in an engine's mark."""
        return Verdict(self.engine(dp_rank) & VERDICT_MASK)

    def frontend_verdict(self, index: int) -> Verdict:
        """The verdict in a front-end's mark."""
        return Verdict(self._words[self._at_frontend + index] & VERDICT_MASK)

    def set_engine(
        self,
        dp_rank: int,
        *,
        verdict: Verdict | None = None,
        on_behalf: bool | None = None,
        drained: bool | None = None,
    ) -> None:
        """Changes the given parts of an engine's mark."""
        with self._lock:
            mark = self.engine(dp_rank)
            if verdict is not None:
                mark = mark & ~VERDICT_MASK | verdict
            if on_behalf is not None:
                mark = mark & ~ON_BEHALF | (ON_BEHALF if on_behalf else 0)
            if drained is not None:
                mark = mark & ~DRAINED | (DRAINED if drained else 0)
            self._store(ChangeKind.ENGINE, dp_rank, self._at_engine + dp_rank, mark)

    def clear_engine(self, dp_rank: int) -> None:
        """Takes all marks off a rank that is no longer there."""
        with self._lock:
            self._store(ChangeKind.ENGINE, dp_rank, self._at_engine + dp_rank, 0)

    def set_frontend(self, index: int, verdict: Verdict) -> None:
        """Sets a front-end's verdict."""
        with self._lock:
            self._store(ChangeKind.FRONTEND, index, self._at_frontend + index, verdict)

    def set_dp_size(self, dp_size: int) -> None:
        """Sets the number of ranks that take part."""
        with self._lock:
            self._store(ChangeKind.DP_SIZE, 0, self._at_dp_size, dp_size)

    def begin_epoch(self) -> None:
        """Notes that this coordinator has the board now."""
        with self._lock:
            self._store(ChangeKind.COORDINATOR, 0, self._at_epoch, (self._words[self._at_epoch] & COUNT_MASK) + 1)

    def _store(self, kind: ChangeKind, row: int, at: int, value: int) -> None:
        words = self._words
        before = words[at]
        if before != value:
            revision = (words[self._at_revision] & COUNT_MASK) + 1
            slot = revision % layout.CHANGES
            # SYNC: the change and its record, then the revision; a front-end loads the revision, then what
            # changed. On Arm it may see the new revision with the old mark; it looks again every
            # LOOK_INTERVAL_NS. A reader of the records loads the revision before and after them.
            words[at] = value
            words[self._at_change_time + slot] = time.monotonic_ns()
            words[self._at_change + slot] = pack_change(revision, kind, row, before, value)
            words[self._at_revision] = revision
