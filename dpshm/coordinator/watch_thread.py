"""The watch thread: reads every row's lock and beat, and publishes its verdicts as marks on the board.

A round every `WATCH_INTERVAL_S` tests the locks. A process that this pid namespace can see is also dead as soon as
the kernel ends it, although the kernel drops its lock only when its memory is freed (`dpshm.linux.processes`). A
pidfd for each such process ends the wait between rounds as soon as one of its threads exits. A round judges the
rows only if it found a change, or if an engine may have stalled since the last judgement.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from typing import NamedTuple

from dpshm.board.board import Board
from dpshm.board.locks import engine_byte, frontend_byte
from dpshm.board.words import ON_BEHALF, RELAYED, REMOTE, VERDICT_MASK
from dpshm.coordinator.mailbox import Mailbox
from dpshm.coordinator.row import CoordinatorRow
from dpshm.linux import processes
from dpshm.linux.processes import Life
from dpshm.rules.liveness import (
    HANGING,
    REMOTE_INTERVAL_NS,
    SILENT_INTERVALS,
    EngineSigns,
    Observation,
    Silence,
    Stillness,
    Verdict,
    evidence_of,
    has_work,
    judge,
    still_holds,
)

logger = logging.getLogger(__name__)

_S = 1_000_000_000
WATCH_INTERVAL_S = 0.08
"""A death is known within 100 ms, or at once where there is a pidfd. Each round costs an idle process CPU."""

QUIET_INTERVAL_S = 0.3
"""Interval between rounds once no process has had work, come or gone for `QUIET_AFTER_NS`, and each has a pidfd.
Front-ends trust a beat that is less than 0.5 s old."""
QUIET_AFTER_NS = 2 * _S
SOON_S = 0.005
SOON_ROUNDS = 10
"""Rounds that follow soon on the exit of a thread: the other threads of its process may not have begun to exit."""
STOP_TIMEOUT_S = 5.0


class Occupant(NamedTuple):
    """The process that took a row.

    Attributes:
        incarnation: of the row.
        pid: as the row gives it.
        started: its start time; 0 if there was no such process in this pid namespace when it was first looked for.
        pidfd: readable when a thread of it has ended; None where there is none.
        ended: the kernel was seen to end it, or it is gone. It stays so.
    """

    incarnation: int
    pid: int
    started: int = 0
    pidfd: int | None = None
    ended: bool = False


class WatchThread(threading.Thread):
    """Runs `round` at its interval, when a watched process exits, and when notified.

    Args:
        board: the group's.
        row: the coordinator's row of that board; verdicts become its row.
        stall_timeout_ns: see `dpshm.rules.liveness`.

    Attributes:
        mailbox: notifies the thread that a round is due.
    """

    def __init__(self, board: Board, row: CoordinatorRow, stall_timeout_ns: int) -> None:
        super().__init__(name="dpshm-watch", daemon=True)
        self._board = board
        self._row = row
        self._stall_timeout_ns = stall_timeout_ns
        self.mailbox = Mailbox(f"the watch of group {board.segment.group!r}")
        self._epoll = select.epoll()
        self._epoll.register(self.mailbox.fd, select.EPOLLIN)
        self._occupants: dict[tuple[str, int], Occupant] = {}
        self._still: dict[int, Stillness] = {}
        self._silence: dict[int, Silence] = {}  # of ranks on other nodes
        self._silent: tuple[int, ...] = ()
        self._pid_namespace = processes.namespace_inode("pid")
        self._judged: object = None  # the sample that the last verdicts followed from
        self._next_judging_ns = 0
        self._quiet_from_ns = 0
        self._rows: tuple[int, bytes] = (0, b"")
        self._row_bytes: list[int] = []
        self._soon = 0
        self._warned_unlinked = False

    def stop(self) -> None:
        """Ends the thread, if it was started, and waits for it."""
        self.mailbox.end()
        if self.ident is not None:
            self.join(STOP_TIMEOUT_S)
        for occupant in self._occupants.values():
            if occupant.pidfd is not None:
                os.close(occupant.pidfd)
        self._occupants.clear()
        self._epoll.close()
        self.mailbox.close()

    def run(self) -> None:
        """Runs rounds until it is asked to end."""
        while not self.mailbox.end_asked:
            quiet = time.monotonic_ns() >= self._quiet_from_ns
            interval = SOON_S if self._soon else QUIET_INTERVAL_S if quiet else WATCH_INTERVAL_S
            self._soon = max(0, self._soon - 1)
            for fd, _ in self._epoll.poll(interval):
                self._judged = None
                if fd == self.mailbox.fd:
                    self.mailbox.receive()
                else:
                    self._forget_pidfd(fd)
                    self._soon = SOON_ROUNDS
            try:
                self.round(time.monotonic_ns())
            except Exception:
                logger.exception("liveness scan failed, retrying")
                time.sleep(WATCH_INTERVAL_S)

    def round(self, now_ns: int) -> None:
        """Samples the rows, and judges them all if the sample is new or a judgement is due."""
        board = self._board
        self._silent = self._listen(now_ns)
        sample = self._sample()
        if sample != self._judged:
            self._quiet_from_ns = now_ns + QUIET_AFTER_NS
        if sample != self._judged or now_ns >= self._next_judging_ns:
            # An engine may stall without any change: a tenth of the timeout is soon enough to notice.
            self._next_judging_ns = now_ns + min(self._stall_timeout_ns // 10 or _S, _S)
            self._judge(now_ns)
            self._judged = sample
        board.coordinator_beat[0] = now_ns

    def _sample(self) -> object:
        """What verdicts follow from, except for stalls: the locks, the processes of the rows, and their ends."""
        board = self._board
        incarnations = board.frontend_incarnation.tobytes()
        if (rows := (board.dp_size, incarnations)) != self._rows:
            self._rows = rows
            columns, used = board.segment.header.columns, board.frontends_used()
            self._row_bytes = [engine_byte(columns, e) for e in range(board.dp_size)]
            self._row_bytes += [frontend_byte(columns, f) for f in range(used)]
        n = board.dp_size
        self._look_for_ends()
        return (
            [key for key, occupant in self._occupants.items() if occupant.ended],
            *(rows, board.frontend_pid.tobytes(), board.segment.locks.each_locked(self._row_bytes)),
            *(board.engine_incarnation[:n].tobytes(), board.engine_pid[:n].tobytes(), self._silent),
        )

    def _listen(self, now_ns: int) -> tuple[int, ...]:
        """The ranks of other nodes that are silent."""
        ranks = range(self._board.dp_size)
        remote = [e for e in ranks if self._row.is_remote(e) and not self._row.is_relayed(e)]
        if not remote:
            self._silence.clear()
            return ()
        heard = self._board.remote_state[:, 0]
        return tuple(e for e in remote if self._silence.setdefault(e, Silence()).look(int(heard[e]), now_ns))

    def _look_for_ends(self) -> None:
        for key, occupant in self._occupants.items():
            known = occupant.started and not occupant.ended
            if known and processes.life_of(occupant.pid, occupant.started) in (Life.EXITS, Life.GONE):
                self._occupants[key] = occupant._replace(ended=True)

    def _judge(self, now_ns: int) -> None:
        board = self._board
        n = board.dp_size
        for e in range(n):
            self._judge_engine(e, now_ns)
        for f in range(board.node, board.frontends_used(), board.nodes):  # the relay judges the others
            self._judge_frontend(f)
        blind = any(o.pidfd is None and self._holds(*key) for key, o in self._occupants.items())
        if blind or any(has_work(board.engine_signs(e)) for e in range(n)):
            self._quiet_from_ns = now_ns + QUIET_AFTER_NS
        if not self._warned_unlinked and not board.segment.linked:
            self._warned_unlinked = True
            logger.warning(
                "%s, or its lock file, was unlinked under the live group %r: routing goes on, but no process can "
                "attach any more. Restart the group, and find what cleans that folder (systemd's RemoveIPC?)",
                board.segment.path,
                board.segment.group,
            )

    def _judge_engine(self, e: int, now_ns: int) -> None:
        board, row = self._board, self._row
        locked = board.engine_alive(e)
        mark = row.engine(e)
        stock = bool(mark & ON_BEHALF)
        if stock and not locked:
            return
        remote = bool(mark & REMOTE) and not locked
        if remote and mark & RELAYED:
            return  # the relay says what its own node says of it
        before = Verdict(mark & VERDICT_MASK)
        if remote and before in (Verdict.UNKNOWN, Verdict.ABSENT):
            return  # the wave thread hears it again
        incarnation = int(board.engine_incarnation[e])
        pid, started = int(board.engine_pid[e]), int(board.engine_start_time[e])
        ending = self._follow(("engine", e), incarnation, pid, 0 if remote else started)  # pids of another node
        signs = board.engine_signs(e)
        still = self._still.get(e) or self._begin_with(e, signs, now_ns)
        beat_age_ns, progress_age_ns = still.look(signs, now_ns)
        if before is Verdict.STALLED and beat_age_ns < self._stall_timeout_ns:
            progress_age_ns = still.move_again(now_ns)
        ages = beat_age_ns, progress_age_ns
        there = e not in self._silent if remote else locked
        seen = Observation(bool(board.engine_pid[e]), there, has_work(signs), signs.paused, *ages, remote, ending)
        verdict = judge(seen, self._stall_timeout_ns)
        if verdict in HANGING:
            self._next_judging_ns = 0  # the next round sees whether it moves again
        if verdict is not before or stock or (locked and mark & REMOTE):
            evidence = evidence_of(verdict, signs)
            here = False if locked else None
            if not row.set_engine(e, verdict=verdict, evidence=evidence, on_behalf=here, remote=here, judged=mark):
                self._next_judging_ns = 0  # the wave thread has just heard of it: the next round judges again
            elif verdict is not before:
                self._report(("engine", e), int(board.engine_pid[e]), before, verdict, self._saw(verdict, signs))

    def _begin_with(self, e: int, signs: EngineSigns, now_ns: int) -> Stillness:
        """What is known of a rank that this thread sees for the first time: what an earlier coordinator saw."""
        still = self._still[e] = Stillness()
        before = self._row.engine_verdict(e)
        if before in HANGING and still_holds(before, int(self._board.evidence[e]), signs):
            still.keep(before, signs, now_ns - self._stall_timeout_ns, now_ns)
        return still

    def _saw(self, verdict: Verdict, signs: EngineSigns) -> str:
        timeout = f"for {self._stall_timeout_ns / _S:g} s"
        queue = f": {signs.waiting} waiting, {signs.running} running, and {timeout}"
        match verdict:
            case Verdict.STALLED:
                return f"{queue} no sign of life{' within a step' if signs.step_start else ''}"
            case Verdict.STUCK:
                return f"{queue} it admitted, computed and finished nothing, although it goes on publishing"
            case Verdict.UNKNOWN:
                return f": nothing was heard of it for {SILENT_INTERVALS * REMOTE_INTERVAL_NS / _S:g} s"
            case _:
                return ""

    def _judge_frontend(self, f: int) -> None:
        board, row = self._board, self._row
        incarnation = int(board.frontend_incarnation[f])
        ending = self._follow(
            ("front-end", f), incarnation, int(board.frontend_pid[f]), int(board.frontend_start_time[f])
        )
        seen = Observation(bool(board.frontend_pid[f]), board.frontend_alive(f), ending=ending)
        verdict = judge(seen, 0)
        before = row.frontend_verdict(f)
        if verdict is not before:
            row.set_frontend(f, verdict)
            self._report(("front-end", f), int(board.frontend_pid[f]), before, verdict)

    def _holds(self, kind: str, row: int) -> bool:
        board = self._board
        return board.engine_present(row) if kind == "engine" else board.frontend_alive(row)

    def _follow(self, key: tuple[str, int], incarnation: int, pid: int, started: int) -> bool:
        """Looks for the row's present process, if this pid namespace can see it. True if that process ends."""
        known = self._occupants.get(key)
        if known is None or (known.incarnation, known.pid) != (incarnation, pid):
            if known is not None and known.pidfd is not None:
                self._forget_pidfd(known.pidfd)
            (kind, row), board = key, self._board
            namespaces = board.engine_pid_namespace if kind == "engine" else board.frontend_pid_namespace
            visible = incarnation > 0 and int(namespaces[row]) == self._pid_namespace != 0
            known = Occupant(incarnation, pid)
            if visible and processes.life_of(pid, started) in (Life.LIVES, Life.EXITS):
                known = known._replace(started=started)
            self._occupants[key] = known
        if known.started and known.pidfd is None and not known.ended:
            # A pidfd of a thread that ended alone is replaced here, too.
            pidfd = processes.open_pidfd(pid, known.started, thread=True)
            self._occupants[key] = known._replace(pidfd=pidfd)
            if pidfd is not None:
                self._epoll.register(pidfd, select.EPOLLIN)
        return known.ended

    def _forget_pidfd(self, pidfd: int) -> None:
        for key, occupant in self._occupants.items():
            if occupant.pidfd == pidfd:
                self._epoll.unregister(pidfd)
                os.close(pidfd)
                self._occupants[key] = occupant._replace(pidfd=None)
                return

    @staticmethod
    def _report(who: tuple[str, int], pid: int, before: Verdict, verdict: Verdict, saw: str = "") -> None:
        bad = verdict in (Verdict.DEAD, Verdict.UNKNOWN, *HANGING)
        logger.log(
            logging.WARNING if bad and who[0] == "engine" else logging.INFO,
            "%s %d (pid %d) is %s, was %s%s",
            *(*who, pid, verdict.name.lower(), before.name.lower(), saw),
        )
