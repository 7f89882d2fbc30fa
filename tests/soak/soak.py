"""The soak: engines and front-ends at the highest rate that the machine takes, while processes are killed.

A soak runs in rounds. In each, random victims are killed with SIGKILL, stopped for a while, or told to leave, and
started again; in the first half of the rounds the coordinator is killed too. Then the missing processes are
started, the front-ends stop sending, the books are checked (`tests.soak.books`) and a census is taken: memory,
descriptors and threads of the coordinator, and of those engines and front-ends that are never touched.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpshm import Board, CoordinatorProcess
from dpshm.board.segment import sweep
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import Phase
from tests.soak.books import Books
from tests.soak.ledger import MAX_LIVES, Ledger
from tests.soak.members import Census, Member, census
from tests.support import Remote, count_fds, count_threads, leftovers

CHAOS_INTERVAL_S = 0.1
COORDINATOR_INTERVAL_S = 4.0
CALM_S = 1.0
QUIET_TIMEOUT_S = 60.0
PROGRESS_S = 5.0
STALL_TIMEOUT_S = 0.5
RSS_GROWTH_MB = 8.0
ZMQ_THREADS = 2
START_TIMEOUT_S = 120.0
"""It has to start beside 32 processes that take all they can, and whatever else the machine does."""
BEGIN = """
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
from tests.soak.processes import run
run(role, told, group=group, ledger=ledger, peers=peers, slot=slot, life=life)
"""


class Soak:
    """One soak.

    Args:
        seconds: how long, more or less.
        engines: how many.
        frontends: how many.
        seed: of the lots.
        say: takes a line of progress.
    """

    def __init__(
        self,
        seconds: float,
        *,
        engines: int = 16,
        frontends: int = 16,
        seed: int = 0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._seconds = seconds
        self._rounds = max(2, min(10, round(seconds / 15)))
        self._random = random.Random(seed)
        self._say = say
        self._group = f"soak-{os.getpid()}"
        self._peers = max(engines, frontends)
        self._members = [Member("engine", e) for e in range(engines)]
        self._members += [Member("front-end", f) for f in range(frontends)]
        self._engines, self._frontends = self._members[:engines], self._members[engines:]
        self._next_life = 0
        self._began = 0.0
        self._coordinator: Any = None
        self._board: Any = None
        self._ledger: Any = None
        self._censuses: list[dict[str, Census]] = []
        self._coordinator_pids: list[int] = []
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(self) -> dict[str, Any]:
        """Runs it; the result, for machines. Whatever ends it, nothing of it stays."""
        Remote().close()  # the fork server, and what comes with it, stay
        began, descriptors, threads = time.monotonic(), count_fds(), count_threads()
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            self._folder = Path(folder)
            self._ledger = Ledger(self._folder / "ledger", self._peers)
            try:
                self._start_all()
                self._began = time.monotonic()
                for number in range(self._rounds):
                    self._round(number)
                    if self.problems:
                        break
                self._compare()
                self._totals_at_end = self._books().totals()
                self._wave_at_end, self._epoch_at_end = self._board.wave, int(self._board.epoch[0])
            except BaseException:
                self._end_all()
                sweep(self._group)  # it may have been between two coordinators
                raise
            self._end_all()
            self._read_log()
        left = leftovers(self._group)
        for what, before, after in (
            ("descriptors", descriptors, count_fds()),
            ("threads", threads, count_threads()),
        ):
            if after > before:
                self.problems.append(f"this process has {after} {what}, and had {before}")
        if left:
            self.problems.append(f"left behind: {left}")
        return self._result(time.monotonic() - began)

    # Start and end.

    def _start_all(self) -> None:
        self._start_coordinator()
        self._board = Board.attach(self._group)
        for member in self._members:
            self._start(member)

    def _start_coordinator(self) -> None:
        with _stderr_to(self._folder / "log"):
            self._coordinator = CoordinatorProcess(
                group=self._group,
                dp_size=len(self._engines),
                stall_timeout_s=STALL_TIMEOUT_S,
                start_timeout_s=START_TIMEOUT_S,
            )

    def _start(self, member: Member) -> None:
        if self._next_life == MAX_LIVES:
            raise RuntimeError(f"the ledger has {MAX_LIVES} rows, and all are used: a shorter run")
        member.lives.append(self._next_life)
        self._next_life += 1
        member.remote = Remote()
        member.remote.begin(
            BEGIN, role=member.role, group=self._group, ledger=str(self._folder / "ledger"),
            peers=self._peers, slot=member.slot, life=member.life,
        )  # fmt: skip

    def _end_all(self) -> None:
        for member in self._members:
            if member.remote is not None:
                if member.stopped:
                    member.remote.signal(signal.SIGCONT)
                member.remote.close()
                member.remote = None
        if self._coordinator is not None:
            self._coordinator.close()
        if self._board is not None:
            self._board.close()
        # Both maps, and the pidfd in the handle, go with these.
        self._board = self._coordinator = self._ledger = None

    # A round.

    def _round(self, number: int) -> None:
        self._ledger.paused = False  # only now: after the last round nothing may move, since the totals are read
        kill_coordinator = number < self._rounds // 2
        # What the rounds before took longer is made up for, but for a part of the time there is always load.
        share = self._seconds / self._rounds
        end = max(self._began + (number + 1) * share - CALM_S, time.monotonic() + share / 2)
        next_progress = time.monotonic()
        next_coordinator = time.monotonic() + COORDINATOR_INTERVAL_S / 2
        while (now := time.monotonic()) < end:
            self._chaos()
            if kill_coordinator and now >= next_coordinator:
                next_coordinator = now + COORDINATOR_INTERVAL_S
                self._replace_coordinator()
            if now >= next_progress:
                next_progress = now + PROGRESS_S
                self._say(self._line(number))
            time.sleep(self._random.random() * 2 * CHAOS_INTERVAL_S)
        self._restore()
        time.sleep(CALM_S)
        self._ledger.paused = True
        self._wait_for_quiet()
        self._check_books()
        self._take_census()

    def _chaos(self) -> None:
        """Does one random act to a random process."""
        member = self._random.choice([m for m in self._members if not m.untouched])
        deed = self._random.choices(("kill", "stop", "leave"), (6, 2, 1))[0]
        remote = member.remote
        if remote is None:
            self._start(member)
        elif member.stopped:
            if deed == "kill":
                self._kill(member)
            else:
                member.stopped = False
                remote.signal(signal.SIGCONT)
        elif deed == "stop":
            member.stopped = True
            remote.signal(signal.SIGSTOP)
            self.counts[f"{member.role}s stopped"] += 1
        elif deed == "leave":
            self._expect_running(member)
            self.counts[f"{member.role}s told to leave"] += 1
            member.killed.append(member.life)
            remote.eval("None")  # told: it closes its handle in good order
            remote.close()
            self._start(member)
        else:
            self._kill(member)
            if self._random.random() < 0.7:  # else it stays away for a while
                self._start(member)

    def _kill(self, member: Member) -> None:
        self._expect_running(member)
        assert member.remote is not None
        member.killed.append(member.life)
        member.remote.kill()
        member.remote.close()
        member.remote, member.stopped = None, False
        self.counts[f"{member.role}s killed"] += 1

    def _replace_coordinator(self) -> None:
        wave = self._board.wave
        os.kill(self._coordinator.proc.pid, signal.SIGKILL)
        self._coordinator.proc.join()
        self._coordinator.close()
        self.counts["coordinators killed"] += 1
        time.sleep(self._random.random() * 0.5)
        self._start_coordinator()
        if self._board.wave < wave:
            self.problems.append(f"the wave fell from {wave} to {self._board.wave} with a coordinator")

    def _expect_running(self, member: Member) -> None:
        """A process that ended by itself is a problem, and says why."""
        assert member.remote is not None
        if member.remote.ended():
            try:
                member.remote.eval("None")
                why = "it returned"
            except Exception as e:
                why = str(e)
            self.problems.append(f"{member} ended by itself: {why}")

    def _restore(self) -> None:
        """Starts and continues all processes until every one runs."""
        for member in self._members:
            if member.stopped and member.remote is not None:
                member.stopped = False
                member.remote.signal(signal.SIGCONT)
            if member.remote is None:
                self._start(member)

    def _wait_for_quiet(self) -> None:
        deadline = time.monotonic() + QUIET_TIMEOUT_S
        while True:
            loud = [str(m) for m in self._members if not self._ledger.get(m.life, "quiet")]
            dead = [e for e in range(len(self._engines)) if self._board.engine_mark[e] & 3 != Verdict.ALIVE]
            if not loud and not dead and self._board.phase is Phase.PAUSED:
                return
            for member in self._members:
                self._expect_running(member)
            if self.problems:
                return
            if time.monotonic() > deadline:
                seen = self._board.snapshot()[["dp_rank", "state", "wave", "in_flight"]].tolist()
                self.problems.append(
                    f"not quiet {QUIET_TIMEOUT_S:g} s after the last request: {loud}; not alive: {dead}; "
                    f"{self._board.phase.name}, {seen}"
                )
                return
            time.sleep(0.02)

    def _check_books(self) -> None:
        self.problems += self._books().check(self._board)

    def _books(self) -> Books:
        return Books(self._ledger, self._engines, self._frontends)

    # What piles up.

    def _take_census(self) -> None:
        taken = {str(m): census(m.remote.pid) for m in self._members if m.untouched and m.remote is not None}
        taken["coordinator"] = census(self._coordinator.proc.pid)
        self._censuses.append(taken)
        self._coordinator_pids.append(self._coordinator.proc.pid)

    def _compare(self) -> None:
        """The last census against the first of the same process."""
        if not self._censuses:
            return
        last = self._censuses[-1]
        for name, after in last.items():
            same = self._censuses_of(name)
            before = same[0]
            if after.rss_mb > before.rss_mb + RSS_GROWTH_MB:
                self.problems.append(
                    f"{name}: {after.rss_mb:.1f} MB, {before.rss_mb:.1f} MB {len(same) - 1} rounds before"
                )
            # A front-end connects to the coordinator when it first wakes it: two threads, some descriptors.
            if after.descriptors > before.descriptors + len(self._frontends):
                self.problems.append(f"{name}: {after.descriptors} descriptors, before {before.descriptors}")
            if after.threads > before.threads + ZMQ_THREADS:
                self.problems.append(f"{name}: {after.threads} threads, before {before.threads}")

    def _censuses_of(self, name: str) -> list[Census]:
        """All those of the process that goes by a name now."""
        pids = self._coordinator_pids
        return [
            c[name]
            for c, pid in zip(self._censuses, pids, strict=True)
            if name != "coordinator" or pid == pids[-1]
        ]

    def _read_log(self) -> None:
        """Coordinators may warn of the dead; they may not fail."""
        with suppress(FileNotFoundError):
            for line in (self._folder / "log").read_text(encoding="utf-8", errors="replace").splitlines():
                if "Traceback" in line or " ERROR " in line:
                    self.problems.append(f"a coordinator's log: {line}")

    # What is told.

    def _line(self, number: int) -> str:
        totals = self._books().totals()
        kills = sum(n for what, n in self.counts.items() if "killed" in what)
        return (
            f"round {number + 1} of {self._rounds}: {totals['sent']} sent, {totals['completed']} completed, "
            f"{kills} killed, wave {self._board.wave}, epoch {int(self._board.epoch[0])}"
        )

    def _result(self, seconds: float) -> dict[str, Any]:
        totals = self._totals_at_end
        untouched = self._censuses[-1] if self._censuses else {}
        return {
            "seconds": round(seconds, 1),
            "rounds": len(self._censuses),
            "engines": len(self._engines),
            "frontends": len(self._frontends),
            **totals,
            "requests_per_s": round(totals["sent"] / seconds),
            **{what.replace(" ", "_").replace("-", ""): n for what, n in sorted(self.counts.items())},
            "wave": self._wave_at_end,
            "epoch": self._epoch_at_end,
            "census_first": {name: self._censuses_of(name)[0]._asdict() for name in untouched},
            "census_last": {name: self._censuses_of(name)[-1]._asdict() for name in untouched},
            "problems": self.problems,
        }


@contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """What is started meanwhile writes its stderr there."""
    kept = os.dup(2)
    with path.open("ab") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
