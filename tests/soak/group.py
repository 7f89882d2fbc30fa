"""The processes of a soak: how each is started, stopped, killed and ended, and what was done to how many.

A process that ended by itself is a problem, and the group says why.
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from dpshm import Board, CoordinatorProcess, GroupInUse
from tests.soak.ledger import MAX_LIVES, NO_STOCK, Ledger
from tests.soak.members import Member
from tests.support import Remote

STALL_TIMEOUT_S = 0.5
START_TIMEOUT_S = 120.0
"""It has to start beside all these processes that take all they can, and whatever else the machine does."""
FORKS = 0.2
"""The share of engines and front-ends that fork a worker."""
_NUMBERS = count()
BEGIN = """
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
from tests.soak.processes import run
run(role, told, group=group, ledger=ledger, peers=peers, slot=slot, life=life, fork=fork)
"""


class SoakGroup:
    """One group.

    Args:
        folder: for its ledger and its coordinators' log.
        engines: how many.
        stock: how many of them speak vLLM's messages alone: the last ones.
        frontends: how many.
        readers: how many.
        lots: that decide which processes fork.

    Attributes:
        name: the group's.
        counts: what was done, and how often.
        problems: what went wrong.
    """

    def __init__(
        self, folder: Path, *, engines: int, stock: int, frontends: int, readers: int, lots: random.Random
    ) -> None:
        # Forked workers of an earlier soak may still hold the names of its inboxes.
        self.name = f"soak-{os.getpid()}-{next(_NUMBERS)}"
        self.engines = [Member("engine", e) for e in range(engines - stock)]
        self.engines += [Member("stock engine", e) for e in range(engines - stock, engines)]
        self.frontends = [Member("front-end", f) for f in range(frontends)]
        self.readers = [Member("reader", r) for r in range(readers)]
        self.members = self.engines + self.frontends + self.readers
        self.counts: Counter[str] = Counter(
            {f"{role}s killed": 0 for role in ("engine", "front-end", "coordinator")}
        )
        self.problems: list[str] = []
        self.log = folder / "log"
        self._peers = max(engines, frontends, readers)
        self._path = folder / "ledger"
        self.ledger = Ledger(self._path, self._peers)
        self._lots = lots
        self._next_life = 0
        for member in self.engines[engines - stock :]:
            self.ledger.set_stock(member.slot, NO_STOCK)
        self._start_coordinator()
        self.board = Board.attach(self.name)
        for member in self.members:
            self.start(member)

    def start(self, member: Member) -> None:
        """A new process for a member that has none."""
        if self._next_life == MAX_LIVES:
            raise RuntimeError(f"the ledger has {MAX_LIVES} rows, and all are used: a shorter run")
        member.lives.append(self._next_life)
        self._next_life += 1
        member.remote = Remote()
        fork = member.role in ("engine", "front-end") and not member.untouched and self._lots.random() < FORKS
        self.counts["workers forked"] += fork
        member.remote.begin(
            BEGIN, role=member.role, group=self.name, ledger=str(self._path), peers=self._peers,
            slot=member.slot, life=member.life, fork=fork,
        )  # fmt: skip

    def kill(self, member: Member) -> None:
        """SIGKILL."""
        self.expect_running(member)
        assert member.remote is not None
        member.killed.append(member.life)
        member.remote.kill()
        member.remote.close()
        member.remote, member.stopped = None, False
        self._forget_stock(member)
        self.counts[f"{member.role}s killed"] += 1

    def leave(self, member: Member) -> None:
        """It closes its handle in good order, and a new process takes its place."""
        self.expect_running(member)
        assert member.remote is not None
        self.counts[f"{member.role}s told to leave"] += 1
        member.killed.append(member.life)
        member.remote.eval("None")
        member.remote.close()
        self._forget_stock(member)
        self.start(member)

    def stop(self, member: Member) -> None:
        """SIGSTOP."""
        assert member.remote is not None
        member.stopped = True
        member.remote.signal(signal.SIGSTOP)
        self.counts[f"{member.role}s stopped"] += 1

    def go_on(self, member: Member) -> None:
        """SIGCONT."""
        assert member.remote is not None
        member.stopped = False
        member.remote.signal(signal.SIGCONT)

    def restore(self) -> None:
        """Starts and continues all processes until every one runs."""
        for member in self.members:
            if member.stopped and member.remote is not None:
                self.go_on(member)
            if member.remote is None:
                self.start(member)

    def expect_running(self, member: Member) -> None:
        """A process that ended by itself is a problem, and says why."""
        assert member.remote is not None
        if member.remote.ended():
            try:
                member.remote.eval("None")
                why = "it returned"
            except Exception as e:
                why = str(e)
            self.problems.append(f"{member} ended by itself: {why}")

    def _forget_stock(self, member: Member) -> None:
        if member.role == "stock engine":
            self.ledger.set_stock(member.slot, NO_STOCK)  # only now: its answers are where they belong

    # The coordinator.

    @property
    def coordinator_pid(self) -> int:
        """The coordinator's."""
        return self._coordinator.proc.pid

    def kill_coordinator(self) -> None:
        """SIGKILL."""
        os.kill(self.coordinator_pid, signal.SIGKILL)
        self._coordinator.proc.join()
        self._coordinator.close()
        self.counts["coordinators killed"] += 1

    def replace_coordinator(self, rivals: int) -> None:
        """So many start at once for a group that has none; one alone may have it."""
        wave = self.board.wave
        with _stderr_to(self.log), ThreadPoolExecutor(rivals) as pool:
            started = [c for c in pool.map(self._try_coordinator, range(rivals)) if c is not None]
        self.counts["coordinators refused"] += rivals - len(started)
        if len(started) != 1:
            self.problems.append(f"of {rivals} coordinators that started at once {len(started)} have the group")
        self._coordinator, *others = started
        for other in others:
            other.close()
        if self.board.wave < wave:
            self.problems.append(f"the wave fell from {wave} to {self.board.wave} with a coordinator")

    def _try_coordinator(self, _: int) -> CoordinatorProcess | None:
        try:
            return CoordinatorProcess(
                group=self.name,
                dp_size=len(self.engines),
                stall_timeout_s=STALL_TIMEOUT_S,
                start_timeout_s=START_TIMEOUT_S,
            )
        except GroupInUse:
            return None

    def _start_coordinator(self) -> None:
        with _stderr_to(self.log):
            coordinator = self._try_coordinator(0)
        assert coordinator is not None
        self._coordinator = coordinator

    # The end.

    def close(self) -> None:
        """Ends every process."""
        for member in self.members:
            if member.remote is not None:
                if member.stopped:
                    self.go_on(member)
                member.remote.close()
                member.remote = None
        self._coordinator.close()
        self.board.close()
        # Both maps, and the pidfd in the handle, go with these.
        del self.board, self._coordinator, self.ledger


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
