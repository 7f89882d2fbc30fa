"""Who lives: the locks that processes hold, and what the words of the board tell where there are none.

A reader of another user's group has no locks (`dpshm.board.segment.Segment.has_locks`).
"""

from __future__ import annotations

import time
from functools import cache

from dpshm.board import layout
from dpshm.board.columns import Columns
from dpshm.board.locks import coordinator_byte, engine_byte, frontend_byte
from dpshm.board.words import ON_BEHALF, RELAYED, REMOTE, VERDICT_MASK, unpack_load, unpack_state
from dpshm.linux import processes
from dpshm.rules.liveness import (
    HANGING,
    REMOTE_INTERVAL_NS,
    SILENT_INTERVALS,
    EngineSigns,
    Observation,
    Verdict,
    judge,
    still_holds,
)

COORDINATOR_SILENCE_NS = 500_000_000
"""A coordinator whose beat is older does not watch. Then each reader tests the locks itself."""


class Presence(Columns):
    """The columns with what they and the locks say of the life of each process."""

    def coordinator_alive(self) -> bool:
        """Whether a coordinator holds the group."""
        if not self.segment.has_locks:
            return self.is_watched()
        return self.segment.locks.is_locked(coordinator_byte(self._columns))

    def engine_alive(self, dp_rank: int) -> bool:
        """Whether a process holds an engine's row."""
        if not self.segment.has_locks:
            return self._seems_alive("engine", dp_rank)
        return self.segment.locks.is_locked(engine_byte(self._columns, dp_rank))

    def engine_present(self, dp_rank: int) -> bool:
        """Whether a process holds an engine's row, or was heard on another node a moment ago."""
        mark = int(self.engine_mark[dp_rank])
        heard = mark & REMOTE and mark & VERDICT_MASK in (Verdict.ALIVE, *HANGING)
        return bool(heard) or self.engine_alive(dp_rank)

    def engine_ends(self, dp_rank: int) -> bool:
        """Whether the kernel ends the process that took an engine's row. Until then the row may be locked."""
        pid, started = int(self.engine_pid[dp_rank]), int(self.engine_start_time[dp_rank])
        visible = int(self.engine_pid_namespace[dp_rank]) == processes.namespace_inode("pid") != 0
        visible = visible and not int(self.engine_mark[dp_rank]) & REMOTE
        return visible and pid > 0 and processes.life_of(pid, started) is processes.Life.EXITS

    def frontend_alive(self, index: int) -> bool:
        """Whether a process holds a front-end's row."""
        if not self.segment.has_locks:
            return self._seems_alive("frontend", index)
        return self.segment.locks.is_locked(frontend_byte(self._columns, index))

    def is_used(self) -> bool:
        """Whether another handle is attached for writing: the group is not dead."""
        if self.segment.has_locks:
            return self.segment.locks.is_shared()
        return (
            self.coordinator_alive()
            or any(self.engine_alive(e) for e in range(self.dp_size))
            or any(self.frontend_alive(f) for f in range(self.frontends_used()))
        )

    def _seems_alive(self, role: str, row: int) -> bool:
        """What a reader without locks can tell: by the mark while a coordinator watches, else by the process."""
        mark = int((self.engine_mark if role == "engine" else self.frontend_mark)[row])
        pid = int(getattr(self, f"{role}_pid")[row])
        namespace = int(getattr(self, f"{role}_pid_namespace")[row])
        if self.is_watched() or mark & ON_BEHALF or namespace != processes.namespace_inode("pid"):
            return Verdict(mark & VERDICT_MASK) not in (Verdict.ABSENT, Verdict.DEAD)
        return pid > 0 and processes.start_time(pid) == int(getattr(self, f"{role}_start_time")[row])

    def lock_coordinator(self) -> bool:
        """Takes the coordinator's lock. False if another process has it."""
        return self.segment.locks.lock(coordinator_byte(self._columns))

    def lock_engine(self, dp_rank: int) -> bool:
        """Takes the lock of an engine's row. False if another process has it."""
        return self.segment.locks.lock(engine_byte(self._columns, dp_rank))

    def unlock_engine(self, dp_rank: int) -> None:
        """Gives the lock of an engine's row back."""
        self.segment.locks.unlock(engine_byte(self._columns, dp_rank))

    def lock_frontend(self, index: int) -> bool:
        """Takes the lock of a front-end's row. False if another process has it."""
        return self.segment.locks.lock(frontend_byte(self._columns, index))

    def is_watched(self) -> bool:
        """Whether a coordinator keeps the marks up to date: its beat is fresh."""
        return abs(time.monotonic_ns() - int(self.coordinator_beat[0])) < COORDINATOR_SILENCE_NS

    def engine_verdicts(self, *, watched: bool | None = None) -> list[Verdict]:
        """By rank, the coordinator's verdicts.

        While no coordinator watches, the locks tell which processes live. A verdict of stalled or stuck then stays
        until the words change from which it followed. Stock engines stay alive, and a rank of another node is what
        it was called last: no word from it can reach the board. One that a relay brought is unknown once it has
        not been heard for `SILENT_INTERVALS`.

        Args:
            watched: whether a coordinator keeps the marks; default `is_watched`.
        """
        marks = self.engine_mark[: self.dp_size].tolist()
        if self.is_watched() if watched is None else watched:
            return [Verdict(mark & VERDICT_MASK) for mark in marks]
        return [
            Verdict.ALIVE
            if mark & ON_BEHALF
            else self._remote_verdict(e, mark)
            if mark & REMOTE
            else self._unwatched_verdict(e, Verdict(mark & VERDICT_MASK))
            for e, mark in enumerate(marks)
        ]

    def _remote_verdict(self, e: int, mark: int) -> Verdict:
        verdict = Verdict(mark & VERDICT_MASK)
        if not mark & RELAYED or verdict in (Verdict.ABSENT, Verdict.DEAD):
            return verdict
        silent_ns = time.monotonic_ns() - int(self.remote_state[e, layout.REMOTE_WORDS.index("heard")])
        return verdict if silent_ns < SILENT_INTERVALS * REMOTE_INTERVAL_NS else Verdict.UNKNOWN

    def _unwatched_verdict(self, e: int, marked: Verdict) -> Verdict:
        locked = self.engine_alive(e)
        ending = locked and self.engine_ends(e)
        verdict = judge(Observation(bool(self.engine_pid[e]), locked, ending=ending), 0)
        holds = (
            verdict is Verdict.ALIVE
            and marked in HANGING
            and still_holds(marked, int(self.evidence[e]), self.engine_signs(e))
        )
        return marked if holds else verdict

    def engine_signs(self, e: int) -> EngineSigns:
        """What an engine's row shows of its life and work."""
        words, at = self.words, self.index
        waiting, running, _ = unpack_load(words[at("load", e)])
        return EngineSigns(
            incarnation=words[at("engine_incarnation", e)],
            beat=words[at("beat", e)],
            step_start=words[at("step_start", e)],
            waiting=waiting,
            running=running,
            paused=unpack_state(words[at("engine_state", e)])[2],
            tokens=words[at("prompt_tokens", e)] + words[at("generation_tokens", e)],
            finished=words[at("requests_finished", e)],
        )

    def clocks_agree(self) -> bool:
        """Whether this process shares CLOCK_MONOTONIC with the coordinator that made the board."""
        header = self.segment.header
        return header.boot_id == processes.boot_id() and header.time_namespace == _time_namespace()

    def engine_clock_agrees(self, e: int) -> bool:
        """Whether an engine's times can be compared with this process's clock: both have one time namespace.

        True also where the engine does not say which it has (a stock one, or no ``/proc``).
        """
        return int(self.engine_time_namespace[e]) in (0, _time_namespace())

    def counted_frontends(self) -> list[int]:
        """The rows whose bookings count: taken, and not of a front-end that died or whose node is silent."""
        taken: list[int] = self.frontend_pid[: self.frontends_used()].nonzero()[0].tolist()
        if self.is_watched():
            marks = self.frontend_mark.tolist()
            return [f for f in taken if marks[f] not in (Verdict.DEAD, Verdict.UNKNOWN)]
        return [f for f in taken if self.frontend_alive(f)]


_time_namespace = cache(lambda: processes.namespace_inode("time"))
