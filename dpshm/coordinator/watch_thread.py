"""The watch thread: looks at every row's lock and beat, and publishes its verdicts as marks on the board.

A round every `WATCH_INTERVAL_S` tests the locks, which alone decide who is dead. A pidfd for each process
that this pid namespace can see ends the wait between rounds at once when one exits. Rows are judged only when
something changed of what verdicts follow from, or when somebody could have stalled since.
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
from dpshm.board.words import ON_BEHALF, unpack_state
from dpshm.coordinator.row import Marks
from dpshm.linux import processes
from dpshm.rules.liveness import Observation, Verdict, judge

logger = logging.getLogger(__name__)

_S = 1_000_000_000
WATCH_INTERVAL_S = 0.08
"""The dead are to be known within 100 ms; where a pidfd can be had, it is at once. Each round costs the idle
coordinator CPU time."""

QUIET_INTERVAL_S = 0.3
"""Between rounds of a group where nobody has had work, come or gone for `QUIET_AFTER_NS`, and where each process
has a pidfd. Front-ends take a beat for fresh that is 0.5 s old."""
QUIET_AFTER_NS = 2 * _S


class Occupant(NamedTuple):
    """The process that holds a row: what its pidfd, if any, was opened for."""

    incarnation: int
    pid: int
    pidfd: int | None


class WatchThread(threading.Thread):
    """Runs `round` at its interval, whenever a watched process exits, and when poked."""

    def __init__(self, board: Board, marks: Marks, stall_timeout_ns: int) -> None:
        super().__init__(name="dpshm-watch", daemon=True)
        self._board = board
        self._marks = marks
        self._stall_timeout_ns = stall_timeout_ns
        self._stop_asked = False
        self._epoll = select.epoll()  # closes itself, should there be no descriptor for the other
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._occupants: dict[tuple[str, int], Occupant] = {}
        self._moved: dict[int, tuple[tuple[int, int], int]] = {}
        self._pid_namespace = processes.namespace_inode("pid")
        self._judged: object = None  # what the last verdicts followed from
        self._next_judging_ns = 0
        self._quiet_from_ns = 0
        self._rows: tuple[int, bytes] = (0, b"")
        self._row_bytes: list[int] = []
        self._warned_unlinked = False

    def poke(self) -> None:
        """Asks for a round now."""
        os.eventfd_write(self._wake_fd, 1)

    def stop(self) -> None:
        """Ends the thread and waits for it."""
        self._stop_asked = True
        self.poke()
        if self.ident is not None:  # else it was never started
            self.join(timeout=5.0)
        for occupant in self._occupants.values():
            if occupant.pidfd is not None:
                os.close(occupant.pidfd)
        self._occupants.clear()
        self._epoll.close()
        os.close(self._wake_fd)

    def run(self) -> None:
        """The thread."""
        while not self._stop_asked:
            quiet = time.monotonic_ns() >= self._quiet_from_ns
            for fd, _ in self._epoll.poll(QUIET_INTERVAL_S if quiet else WATCH_INTERVAL_S):
                self._judged = None
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                else:
                    self._forget_pidfd(fd)
            try:
                self.round(time.monotonic_ns())
            except Exception:
                logger.exception("a round of the watch failed; the next one comes")
                time.sleep(WATCH_INTERVAL_S)

    def round(self, now_ns: int) -> None:
        """Looks once, and judges every row if that shows anything new."""
        board = self._board
        signs = self._look()
        if signs != self._judged:
            self._quiet_from_ns = now_ns + QUIET_AFTER_NS
        if signs != self._judged or now_ns >= self._next_judging_ns:
            # To see who stalls, a tenth of the timeout is soon enough.
            self._next_judging_ns = now_ns + min(self._stall_timeout_ns // 10 or _S, _S)
            self._judge(now_ns)
            self._judged = signs
        board.coordinator_beat[0] = now_ns

    def _look(self) -> object:
        """What verdicts follow from, but for stalls: who holds which lock, and who took or left which row."""
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
            *(board.engine_incarnation[:n].tobytes(), board.engine_pid[:n].tobytes()),
        )

    def _judge(self, now_ns: int) -> None:
        board = self._board
        n = board.dp_size
        has_work = self._find_work(n)
        for e in range(n):
            self._judge_engine(e, has_work[e], now_ns)
        for f in range(board.frontends_used()):
            self._judge_frontend(f)
        blind = any(o.pidfd is None and self._holds(*key) for key, o in self._occupants.items())
        if blind or any(has_work):
            self._quiet_from_ns = now_ns + QUIET_AFTER_NS
        if not self._warned_unlinked and not board.segment.linked:
            self._warned_unlinked = True
            logger.warning(
                "%s was unlinked under the live group %r: routing goes on, but nobody can attach any more. "
                "Restart the group, and find what cleans that folder (systemd's RemoveIPC?)",
                board.segment.path,
                board.segment.group,
            )

    def _judge_engine(self, e: int, has_work: bool, now_ns: int) -> None:
        board, marks = self._board, self._marks
        locked = board.engine_alive(e)
        stock = bool(marks.engine(e) & ON_BEHALF)
        if stock and not locked:
            return
        incarnation = int(board.engine_incarnation[e])
        self._follow(("engine", e), incarnation, int(board.engine_pid[e]), int(board.engine_start_time[e]))
        paused = unpack_state(int(board.engine_state[e]))[2]
        beat_age_ns = self._beat_age_ns(e, incarnation, now_ns)
        if not has_work:
            self._moved.pop(e, None)  # the timeout counts from when it has work
            beat_age_ns = 0
        signs = Observation(bool(board.engine_pid[e]), locked, has_work, paused, beat_age_ns)
        verdict = judge(signs, self._stall_timeout_ns)
        if verdict is Verdict.STALLED:
            self._next_judging_ns = 0  # the next round sees whether it moves again
        before = marks.engine_verdict(e)
        if verdict is not before or stock:
            marks.set_engine(e, verdict=verdict, on_behalf=False if locked else None)
            self._report("engine", e, int(board.engine_pid[e]), before, verdict)

    def _judge_frontend(self, f: int) -> None:
        board, marks = self._board, self._marks
        incarnation = int(board.frontend_incarnation[f])
        self._follow(("front-end", f), incarnation, int(board.frontend_pid[f]), int(board.frontend_start_time[f]))
        verdict = judge(Observation(bool(board.frontend_pid[f]), board.frontend_alive(f)), 0)
        before = marks.frontend_verdict(f)
        if verdict is not before:
            marks.set_frontend(f, verdict)
            self._report("front-end", f, int(board.frontend_pid[f]), before, verdict)

    def _holds(self, kind: str, row: int) -> bool:
        board = self._board
        return board.engine_alive(row) if kind == "engine" else board.frontend_alive(row)

    def _find_work(self, n: int) -> list[bool]:
        """By rank, whether it is in a step, or has requests waiting or on their way."""
        board = self._board
        requests = board.outstanding_requests(board.counted_frontends()).count()
        not_running = requests > (board.load[:n] >> 16 & 0xFFFFFF)
        busy: list[bool] = ((board.step_start[:n] != 0) | not_running).tolist()
        return busy

    def _beat_age_ns(self, e: int, incarnation: int, now_ns: int) -> int:
        """How long the beat of this incarnation has not moved, by our clock."""
        sign = (incarnation, int(self._board.beat[e]))
        last, since_ns = self._moved.get(e, (None, now_ns))
        if sign != last:
            self._moved[e] = (sign, now_ns)
            return 0
        return now_ns - since_ns

    def _follow(self, key: tuple[str, int], incarnation: int, pid: int, started: int) -> None:
        """Has a pidfd on the row's present process, where that can be seen from here."""
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
    def _report(kind: str, row: int, pid: int, before: Verdict, verdict: Verdict) -> None:
        bad = verdict in (Verdict.DEAD, Verdict.STALLED)
        logger.log(
            logging.WARNING if bad and kind == "engine" else logging.INFO,
            "%s %d (pid %d) is %s, was %s",
            kind,
            row,
            pid,
            verdict.name.lower(),
            before.name.lower(),
        )
