"""The coordinator's row: the words of a board that the coordinator alone writes.

    identity    pid, start time, version, epoch; `ready`
    control     the wave and its phase
    marks       a word for each engine and each front-end: verdict, drained, stock; and `dp_size`
    counters    messages, waves, publications, and how long wake-ups took

Marks are written by two threads: the wave thread knows stock engines and what an operator drained, the watch
thread knows verdicts. Each mark is one word, so a lock keeps the threads from losing each other's part. All other
words are the wave thread's.

Every change of a mark or of `dp_size` ends with a step of the board's `revision`, the one word that a front-end
reads in each decision to know that its list of engines is still right. The newest changes stay on the board, each
with its time, in a ring that the revision counts.
"""

from __future__ import annotations

import os
import threading
import time

from dpshm.board import layout
from dpshm.board.board import Board
from dpshm.board.layout import DROP_REASONS
from dpshm.board.words import (
    COUNT_MASK,
    DRAINED,
    ON_BEHALF,
    RELAYED,
    REMOTE,
    VERDICT_MASK,
    ChangeKind,
    pack_change,
    pack_control,
    saturate,
    unpack_control,
    wake_bucket,
)
from dpshm.linux import processes
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import CoordinatorState
from dpshm.version import version_word


class CoordinatorRow:
    """Reads and writes the coordinator's words on a board whose coordinator lock this process holds."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._words = board.words
        self._at_control = board.index("control")
        self._at_engine = board.index("engine_mark")
        self._at_evidence = board.index("evidence")
        self._at_frontend = board.index("frontend_mark")
        self._at_dp_size = board.index("dp_size")
        self._at_revision = board.index("revision")
        self._at_epoch = board.index("epoch")
        self._at_change = board.index("change")
        self._at_change_time = board.index("change_time")
        self._lock = threading.Lock()

    # Identity.

    def begin(self, dp_size: int) -> None:
        """Stores that this process coordinates the group from now on; a new board gets its number of ranks."""
        if self._words[self._at_epoch] == 0:
            self.set_dp_size(dp_size)
        pid = os.getpid()
        self._set("coordinator_pid", pid)
        self._set("coordinator_start_time", processes.start_time(pid))
        self._set("coordinator_version", version_word())
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Stores that the board has one coordinator more."""
        with self._lock:
            self._change(ChangeKind.COORDINATOR, 0, self._at_epoch, (self._words[self._at_epoch] & COUNT_MASK) + 1)

    @property
    def ready(self) -> bool:
        """Whether all ranks were there at some time, under this coordinator or an earlier one."""
        return self._words[self._board.index("ready")] == 1

    def set_ready(self) -> None:
        """Stores that all ranks are there."""
        self._set("ready", 1)

    # The wave.

    @property
    def control(self) -> CoordinatorState:
        """Wave and phase, as the last coordinator stored them."""
        return CoordinatorState(*unpack_control(self._words[self._at_control]))

    def set_control(self, state: CoordinatorState) -> None:
        """Stores wave and phase."""
        self._words[self._at_control] = pack_control(*state)

    # Counters.

    def count(self, name: str, by: int = 1, *, row: int = 0) -> None:
        """Adds to a counter."""
        at = self._board.index(name, row)
        with self._lock:  # the relay counts too
            self._words[at] = saturate(self._words[at] + by)

    def count_wake_up(self, duration_ns: int) -> None:
        """Counts a wake-up, from when the coordinator heard of it until an engine ran."""
        self.count("wake_ns", duration_ns)
        self.count("wake_bucket", row=wake_bucket(duration_ns))

    def count_drop(self, reason: str) -> None:
        """Counts a message that was dropped, for one of `layout.DROP_REASONS`."""
        self.count("messages_dropped")
        self.count("drops", row=DROP_REASONS.index(reason))

    # Marks.

    def engine(self, dp_rank: int) -> int:
        """An engine's mark."""
        return self._words[self._at_engine + dp_rank]

    def is_stock(self, dp_rank: int) -> bool:
        """Whether the coordinator writes this engine's row on its behalf."""
        return bool(self.engine(dp_rank) & ON_BEHALF)

    def is_remote(self, dp_rank: int) -> bool:
        """Whether this engine is on another node, and the coordinator writes its row as it says."""
        return bool(self.engine(dp_rank) & REMOTE)

    def is_relayed(self, dp_rank: int) -> bool:
        """Whether this engine is of another node's board, and the relay writes its row."""
        return bool(self.engine(dp_rank) & RELAYED)

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
        evidence: int = 0,
        on_behalf: bool | None = None,
        remote: bool | None = None,
        relayed: bool = False,
        drained: bool | None = None,
        judged: int | None = None,
    ) -> bool:
        """Changes the given parts of an engine's mark. Returns whether it has.

        Args:
            dp_rank: the engine.
            verdict: on it.
            evidence: from what the verdict followed (`dpshm.rules.liveness.evidence_of`).
            on_behalf: whether it is a stock engine, whose row the coordinator writes.
            remote: whether it is on another node, and the coordinator writes its row as it says.
            relayed: with `remote`, whether it is of another node's board.
            drained: whether an operator drained it.
            judged: the mark that the verdict followed from. If another thread has changed more of it since than
                what an operator drained, nothing is changed.
        """
        with self._lock:
            mark = self.engine(dp_rank)
            if judged is not None and (mark ^ judged) & ~DRAINED:
                return False
            if verdict is not None:
                self._words[self._at_evidence + dp_rank] = evidence
                mark = mark & ~VERDICT_MASK | verdict
            if on_behalf is not None:
                mark = mark & ~ON_BEHALF | (ON_BEHALF if on_behalf else 0)
            if remote is not None:
                mark = mark & ~(REMOTE | RELAYED) | (REMOTE if remote else 0) | (RELAYED if relayed else 0)
            if drained is not None:
                mark = mark & ~DRAINED | (DRAINED if drained else 0)
            self._change(ChangeKind.ENGINE, dp_rank, self._at_engine + dp_rank, mark)
            return True

    def clear_engine(self, dp_rank: int) -> None:
        """Clears the mark of a rank that does not exist."""
        with self._lock:
            self._change(ChangeKind.ENGINE, dp_rank, self._at_engine + dp_rank, 0)

    def set_frontend(self, index: int, verdict: Verdict) -> None:
        """Sets a front-end's verdict."""
        with self._lock:
            self._change(ChangeKind.FRONTEND, index, self._at_frontend + index, verdict)

    def set_dp_size(self, dp_size: int) -> None:
        """Sets the number of ranks that take part."""
        with self._lock:
            self._change(ChangeKind.DP_SIZE, 0, self._at_dp_size, dp_size)

    def resize(self, dp_size: int, *, drained: bool = False) -> None:
        """Sets the number of ranks; those that are new begin with empty rows, and no rank keeps an old mark.

        Args:
            dp_size: the number.
            drained: whether new ranks begin as drained.
        """
        board, old = self._board, self._board.dp_size
        for e in range(old, dp_size):
            # The lock keeps an engine from taking the row meanwhile; an engine that has the lock keeps its words.
            if board.lock_engine(e):
                for name in ("load", *layout.ENGINE_WORDS):
                    self._words[board.index(name, e)] = 0
                board.nothing_outstanding(e)
                board.unlock_engine(e)
            self.clear_engine(e)
            if drained:
                self.set_engine(e, drained=True)
        self.set_dp_size(dp_size)
        for e in range(dp_size, old):
            self.clear_engine(e)

    def _set(self, name: str, value: int) -> None:
        self._words[self._board.index(name)] = value

    def _change(self, kind: ChangeKind, row: int, at: int, value: int) -> None:
        words = self._words
        before = words[at]
        if before != value:
            revision = (words[self._at_revision] & COUNT_MASK) + 1
            slot = revision % layout.CHANGES
            # SYNC: the record, the change, then the revision; a front-end loads the revision, then what changed.
            # On Arm it may see the new revision with the old mark; it reads the marks again every
            # REFRESH_INTERVAL_NS. A reader of the records loads the revision before and after them. Who waits for
            # a mark sees by the record that the revision is to follow (`Board.is_numbered`).
            words[self._at_change_time + slot] = time.monotonic_ns()
            words[self._at_change + slot] = pack_change(revision, kind, row, before, value)
            words[at] = value
            words[self._at_revision] = revision
