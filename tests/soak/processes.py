"""What each process of the soak runs, by its role."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Protocol

from tests.soak.engines import SoakEngine, SoakStockEngine
from tests.soak.frontends import SoakFrontend
from tests.soak.ledger import Ledger
from tests.soak.readers import SoakReader

WORKER_S = 2.0
"""How long a forked worker outlives its parent."""


class Program(Protocol):
    """A process's whole life."""

    def run(self, told: Callable[[], bool]) -> None:
        """Runs until told to end."""


ROLES: dict[str, Callable[[str, Ledger, int, int], Program]] = {
    "engine": SoakEngine,
    "stock engine": SoakStockEngine,
    "front-end": SoakFrontend,
    "reader": SoakReader,
}


def run(
    role: str,
    told: Callable[[], bool],
    *,
    group: str,
    ledger: str,
    peers: int,
    slot: int,
    life: int,
    fork: bool = False,
) -> None:
    """A process's whole life. With `fork`, a worker that it forks holds all that it held, and outlives it."""
    program = ROLES[role](group, Ledger(ledger, peers), slot, life)
    if fork:
        _fork_worker()
    program.run(told)


def _fork_worker() -> None:
    parent = os.getpid()
    if os.fork():
        return
    try:
        while os.getppid() == parent:
            time.sleep(0.2)
        time.sleep(WORKER_S)
    finally:
        os._exit(0)
