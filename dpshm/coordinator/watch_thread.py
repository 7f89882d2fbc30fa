"""The watch thread: reads every row's lock and beat, and publishes its verdicts as marks on the board.

A round every `WATCH_INTERVAL_S` tests the locks, which alone decide that a process is dead. A pidfd for each
process that this pid namespace can see ends the wait between rounds as soon as one exits. A round judges the rows
only if it found a change, or if an engine may have stalled since the last judgement.
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
from dpshm.board.words import ON_BEHALF
from dpshm.coordinator.mailbox import Mailbox
from dpshm.coordinator.row import CoordinatorRow
from dpshm.linux import processes
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
STOP_TIMEOUT_S = 5.0


class Occupant(NamedTuple):
    """The process that holds a row, and its pidfd, if there is one."""

    incarnation: int
    pid: int
    pidfd: int | None


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
            for fd, _ in self._epoll.poll(QUIET_INTERVAL_S if quiet else WATCH_INTERVAL_S):
                self._judged = None
                if fd == self.mailbox.fd:
                    self.mailbox.receive()
                else:
                    self._forget_pidfd(fd)
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
        """What verdicts follow from, except for stalls: the locks that are held, and the processes of the rows."""
        board = self._board
        incarnations = board.frontend_incarnation.tobytes()
        if (rows := (board.dp_size, incarnations)) != self._rows:
            self._rows = rows
            columns, used = board.segment.header.columns, board.frontends_used()
            self._row_bytes = [engine_byte(columns, e) for e in range(board.dp_size)]
            self._row_bytes += [frontend_byte(columns, f) for f in range(used)]
        n = board.dp_size
        return (
            *(rows, board.frontend_pid.tobytes(), board.segment.locks.each_locked(self._row_bytes)),
            *(board.engine_incarnation[:n].tobytes(), board.engine_pid[:n].tobytes(), self._silent),
        )

    def _listen(self, now_ns: int) -> tuple[int, ...]:
        """The ranks of other nodes that are silent."""
        remote = [e for e in range(self._board.dp_size) if self._row.is_remote(e)]
        if not remote:
            self._silence.clear()
            return ()
        heard = self._board.remote_state[:, 0]
        return tuple(e for e in remote if self._silence.setdefault(e, Silence()).look(int(heard[e]), now_ns))

    def _judge(self, now_ns: int) -> None:
        board = self._board
        n = board.dp_size
        for e in range(n):
            self._judge_engine(e, now_ns)
        for f in range(board.frontends_used()):
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
        stock = bool(row.engine(e) & ON_BEHALF)
        if stock and not locked:
            return
        remote = row.is_remote(e) and not locked
        if remote and row.engine_verdict(e) in (Verdict.UNKNOWN, Verdict.ABSENT):
            return  # the wave thread hears it again
        incarnation = int(board.engine_incarnation[e])
        self._follow(("engine", e), incarnation, int(board.engine_pid[e]), int(board.engine_start_time[e]))
        signs = board.engine_signs(e)
        still = self._still.get(e) or self._begin_with(e, signs, now_ns)
        beat_age_ns, progress_age_ns = still.look(signs, now_ns)
        before = row.engine_verdict(e)
        if before is Verdict.STALLED and beat_age_ns < self._stall_timeout_ns:
            progress_age_ns = still.move_again(now_ns)
        ages = beat_age_ns, progress_age_ns
        there = e not in self._silent if remote else locked
        seen = Observation(bool(board.engine_pid[e]), there, has_work(signs), signs.paused, *ages, remote)
        verdict = judge(seen, self._stall_timeout_ns)
        if verdict in HANGING:
            self._next_judging_ns = 0  # the next round sees whether it moves again
        if verdict is not before or stock or (locked and row.is_remote(e)):
            evidence = evidence_of(verdict, signs)
            here = False if locked else None
            row.set_engine(e, verdict=verdict, evidence=evidence, on_behalf=here, remote=here)
            if verdict is not before:
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
        self._follow(("front-end", f), incarnation, int(board.frontend_pid[f]), int(board.frontend_start_time[f]))
        verdict = judge(Observation(bool(board.frontend_pid[f]), board.frontend_alive(f)), 0)
        before = row.frontend_verdict(f)
        if verdict is not before:
            row.set_frontend(f, verdict)
            self._report(("front-end", f), int(board.frontend_pid[f]), before, verdict)

    def _holds(self, kind: str, row: int) -> bool:
        board = self._board
        return board.engine_present(row) if kind == "engine" else board.frontend_alive(row)

    def _follow(self, key: tuple[str, int], incarnation: int, pid: int, started: int) -> None:
        """Opens a pidfd on the row's present process, if this pid namespace can see it."""
        known = self._occupants.get(key)
        if known is not None and (known.incarnation, known.pid) == (incarnation, pid):
            return
        if known is not None and known.pidfd is not None:
            self._forget_pidfd(known.pidfd)
        kind, row = key
        namespaces = self._board.engine_pid_namespace if kind == "engine" else self._board.frontend_pid_namespace
        visible = incarnation > 0 and int(namespaces[row]) == self._pid_namespace != 0
        pidfd = processes.open_pidfd(pid, started) if visible else None
        self._occupants[key] = Occupant(incarnation, pid, pidfd)
        if pidfd is not None:
            self._epoll.register(pidfd, select.EPOLLIN)

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
