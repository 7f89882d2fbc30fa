"""The members of a soak, and the resources that each process holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from tests.support import Remote

UNTOUCHED = 2
"""So many engines and front-ends live through it all: they show what piles up in a process."""


class Census(NamedTuple):
    """What a process holds."""

    rss_mb: float
    descriptors: int
    threads: int


def census(pid: int) -> Census:
    """Of a living process."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return Census(
        int(fields["VmRSS"].split()[0]) * 1024 / 1e6,
        len(os.listdir(f"/proc/{pid}/fd")),
        len(os.listdir(f"/proc/{pid}/task")),
    )


class Member:
    """An engine or front-end that is to be there, and the process that is it now.

    Attributes:
        lives: the numbers of its processes' rows in the ledger, the present one last.
        killed: those of them that were killed or told to leave.
    """

    def __init__(self, role: str, slot: int) -> None:
        self.role, self.slot = role, slot
        self.remote: Remote | None = None
        self.lives: list[int] = []
        self.killed: list[int] = []
        self.stopped = False

    @property
    def untouched(self) -> bool:
        """Whether nothing is ever done to it."""
        return self.slot < UNTOUCHED

    @property
    def life(self) -> int:
        """The present one."""
        return self.lives[-1]

    def __str__(self) -> str:
        return f"{self.role} {self.slot}"
