"""The soak: engines and front-ends at the highest rate that the machine takes, while everything fails.

A soak runs in rounds. In each, random deeds are done (`tests.soak.deeds`); in the first half of the rounds to the
coordinator too. Then the missing processes are started, the front-ends stop sending, the books are checked
(`tests.soak.books`) and a census is taken: memory, descriptors and threads of the coordinator, and of those
engines and front-ends that are never touched.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpshm.board.sweep import sweep
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import Phase
from tests.soak.books import Books
from tests.soak.deeds import Deeds
from tests.soak.group import SoakGroup
from tests.soak.members import Census, census
from tests.support import Remote, count_fds, count_threads, leftovers

DEED_INTERVAL_S = 0.1
CALM_S = 1.0
QUIET_TIMEOUT_S = 180.0
SETTLE_TIMEOUT_S = 60.0
PROGRESS_S = 5.0
RSS_GROWTH_MB = 8.0
ZMQ_THREADS = 2


class Soak:
    """One soak.

    Args:
        seconds: how long, more or less.
        engines: how many.
        stock: how many of them speak vLLM's messages alone.
        frontends: how many.
        readers: processes that read the board and do nothing else.
        seed: of the lots.
        say: takes a line of progress.
    """

    def __init__(
        self,
        seconds: float,
        *,
        engines: int = 16,
        stock: int = 0,
        frontends: int = 16,
        readers: int = 0,
        seed: int = 0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._seconds = seconds
        self._rounds = max(2, min(10, round(seconds / 15)))
        self._lots = random.Random(seed)
        self._say = say
        self._sizes = {"engines": engines, "stock": stock, "frontends": frontends, "readers": readers}
        self._group: SoakGroup
        self._deeds: Deeds
        self._began = 0.0
        self._censuses: list[dict[str, Census]] = []
        self._coordinator_pids: list[int] = []
        self.problems: list[str] = []

    def run(self) -> dict[str, Any]:
        """Runs it; the result, for machines. Whatever ends it, nothing of it stays."""
        Remote().close()  # the fork server, and what comes with it, stay
        began, descriptors, threads = time.monotonic(), count_fds(), count_threads()
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            group = self._group = SoakGroup(Path(folder), **self._sizes, lots=self._lots)
            self._deeds = Deeds(group, self._lots)
            self.problems = group.problems
            try:
                self._began = time.monotonic()
                for number in range(self._rounds):
                    self._round(number)
                    if self.problems:
                        break
                self._compare()
                self._totals_at_end = self._books().totals()
                self._wave_at_end, self._epoch_at_end = group.board.wave, int(group.board.epoch[0])
            except BaseException:
                group.close()
                sweep(group.name)  # it may have been between two coordinators
                raise
            group.close()
            self._read_log()
        left = leftovers(group.name)
        for what, before, after in (
            ("descriptors", descriptors, count_fds()),
            ("threads", threads, count_threads()),
        ):
            if after > before:
                self.problems.append(f"this process has {after} {what}, and had {before}")
        if left:
            self.problems.append(f"left behind: {left}")
        return self._result(time.monotonic() - began)

    # A round.

    def _round(self, number: int) -> None:
        self._group.ledger.paused = False  # only now: after the last round nothing may move, totals are read
        # What the rounds before took longer is made up for, but for a part of the time there is always load.
        share = self._seconds / self._rounds
        end = max(self._began + (number + 1) * share - CALM_S, time.monotonic() + share / 2)
        next_progress = time.monotonic()
        self._deeds.begin_round()
        while time.monotonic() < end:
            self._deeds.any_process()
            if number < self._rounds // 2:
                self._deeds.coordinator()
            if time.monotonic() >= next_progress:
                next_progress = time.monotonic() + PROGRESS_S
                self._say(self._line(number))
            time.sleep(self._lots.random() * 2 * DEED_INTERVAL_S)
        if number == 0:
            self._deeds.never_missing()
        self._group.restore()
        self._deeds.restore()
        time.sleep(CALM_S)
        self._group.ledger.paused = True
        self._wait_for_quiet()
        self._check_books()
        self._take_census()

    def _wait_for_quiet(self) -> None:
        group, board = self._group, self._group.board
        deadline = time.monotonic() + QUIET_TIMEOUT_S
        while True:
            loud = [str(m) for m in group.members if not group.ledger.get(m.life, "quiet")]
            # A stock engine may be left out until it has something to report.
            own = [m.slot for m in group.engines if m.role == "engine"]
            dead = [e for e in own if board.engine_mark[e] & 3 != Verdict.ALIVE]
            if not loud and not dead and board.phase is Phase.PAUSED:
                return
            for member in group.members:
                group.expect_running(member)
            if self.problems:
                return
            if time.monotonic() > deadline:
                seen = board.snapshot()[["dp_rank", "state", "wave", "in_flight"]].tolist()
                self.problems.append(
                    f"not quiet {QUIET_TIMEOUT_S:g} s after the last request: {loud}; not alive: {dead}; "
                    f"{board.phase.name}, {seen}"
                )
                return
            time.sleep(0.02)

    def _check_books(self) -> None:
        board = self._group.board
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        # A booking at a stock engine counts as received once it is old enough, whatever that engine reports.
        while board.snapshot()["in_flight"].any() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.problems += self._books().check(board)

    def _books(self) -> Books:
        return Books(self._group)

    # What piles up.

    def _take_census(self) -> None:
        members = self._group.members
        taken = {str(m): census(m.remote.pid) for m in members if m.untouched and m.remote is not None}
        taken["coordinator"] = census(self._group.coordinator_pid)
        self._censuses.append(taken)
        self._coordinator_pids.append(self._group.coordinator_pid)

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
            if after.descriptors > before.descriptors + len(self._group.frontends):
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
            for line in self._group.log.read_text(encoding="utf-8", errors="replace").splitlines():
                if "Traceback" in line or " ERROR " in line:
                    self.problems.append(f"a coordinator's log: {line}")

    # What is told.

    def _line(self, number: int) -> str:
        totals = self._books().totals()
        kills = sum(n for what, n in self._group.counts.items() if "killed" in what)
        return (
            f"round {number + 1} of {self._rounds}: {totals['sent']} sent, {totals['completed']} completed, "
            f"{kills} killed, wave {self._group.board.wave}, epoch {int(self._group.board.epoch[0])}"
        )

    def _result(self, seconds: float) -> dict[str, Any]:
        totals = self._totals_at_end
        untouched = self._censuses[-1] if self._censuses else {}
        return {
            "seconds": round(seconds, 1),
            "rounds": len(self._censuses),
            "engines": len(self._group.engines),
            "frontends": len(self._group.frontends),
            **totals,
            "requests_per_s": round(totals["sent"] / seconds),
            **{what.replace(" ", "_").replace("-", ""): n for what, n in sorted(self._group.counts.items())},
            "wave": self._wave_at_end,
            "epoch": self._epoch_at_end,
            "census_first": {name: self._censuses_of(name)[0]._asdict() for name in untouched},
            "census_last": {name: self._censuses_of(name)[-1]._asdict() for name in untouched},
            "problems": self.problems,
        }
