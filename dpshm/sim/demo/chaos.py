"""Chaos: while a demo runs, its processes are stopped, killed and started again, one deed at a time.

Every kind of deed comes once before any comes twice, in a random order. A deed is undone after a moment: a stopped
process goes on, a killed one is started again. So each run shows what the tools show of it, and what requests go
through.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from itertools import product
from random import Random
from typing import NamedTuple, Protocol

from dpshm.sim.demo.children import Child

DEED_S = 2.5
"""From a deed until it is undone: longer than the stall timeout, so that a stopped rank is called stalled."""
PAUSE_S = 1.0
STALL_TIMEOUT_S = 1.0


class Cast(Protocol):
    """The processes of a demo (`dpshm.sim.demo.cast`), as chaos uses them."""

    doomed: set[Child]

    def of_role(self, role: str) -> list[Child]:
        """The present processes of a role."""

    def start_again(self, role: str, number: int) -> None:
        """Starts the successor of a process that was killed."""


class Deed(NamedTuple):
    """Something that was done to a process, and has to be undone."""

    act: str
    role: str
    number: int
    child: Child


class Chaos:
    """Does deeds to a cast, and undoes them.

    Args:
        cast: the processes.
        seed: of the order of deeds and of their victims.
        tell: called with a line for each deed.

    Attributes:
        deeds: how many there were.
    """

    def __init__(self, cast: Cast, seed: int, tell: Callable[[str], None]) -> None:
        self._cast = cast
        self._random = Random(seed)
        self._tell = tell
        self._kinds: list[tuple[str, str]] = []
        self._under_way: Deed | None = None
        self._next_s: float | None = None
        self.deeds = 0

    def turn(self, now_s: float) -> None:
        """Does what is due."""
        if self._next_s is None:
            self._next_s = now_s + PAUSE_S
        elif now_s >= self._next_s:
            if self._under_way is None:
                self._do()
                self._next_s = now_s + DEED_S
            else:
                self.undo()
                self._next_s += PAUSE_S

    def _do(self) -> None:
        if not self._kinds:
            self._kinds = list(product(("stop", "kill"), ("engine", "front-end", "coordinator")))
            self._random.shuffle(self._kinds)
        act, role = self._kinds.pop()
        processes = self._cast.of_role(role)
        number = self._random.randrange(len(processes))
        child = processes[number]
        self._under_way = Deed(act, role, number, child)
        self.deeds += 1
        if act == "kill":
            self._cast.doomed.add(child)
        child.signal(signal.SIGKILL if act == "kill" else signal.SIGSTOP)
        self._tell(f"chaos: {'killed' if act == 'kill' else 'stopped'} {child.name} (pid {child.pid})")

    def undo(self) -> None:
        """Undoes the deed that is being done, if there is one."""
        deed, self._under_way = self._under_way, None
        if deed is None:
            return
        if deed.act == "kill":
            self._cast.start_again(deed.role, deed.number)
            self._tell(f"chaos: started {deed.child.name} again")
        else:
            deed.child.signal(signal.SIGCONT)
            self._tell(f"chaos: let {deed.child.name} go on")
