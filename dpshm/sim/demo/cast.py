"""The processes of a demo: the coordinator, engines and front-ends, their orders, and their successors.

A demo starts them all at once, because an interpreter takes a while, and gives orders when there is a board. A
process that chaos has killed gets a successor with the same orders; a front-end's sends the arrivals to come.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from dpshm.sim.demo import lockstep
from dpshm.sim.demo.chaos import STALL_TIMEOUT_S
from dpshm.sim.demo.children import Child
from dpshm.sim.demo.messages import (
    BroadcastSettings,
    CoordinatorSettings,
    EngineSettings,
    FrontendSettings,
    Go,
    new_prefix,
)
from dpshm.sim.demo.workload import DemoSettings, Share, Workload

LEAD_S = 0.1
"""Time from the order to time 0, so that every front-end has the order by then."""
SUCCESSOR_LEAD_S = 1.0
"""The same for a front-end that has to start first."""

Start = Callable[[str, str, tuple[int, ...]], Child]


class Cast:
    """The processes of one demo.

    Args:
        settings: the demo's settings.
        workload: what front-ends send.
        group: the group's name.
        start: starts a process of a name from a module, with descriptors.

    Attributes:
        coordinator: its one process, in a list as the others.
        engines: the present processes, by rank.
        frontends: the present processes, by index.
        lives: by front-end, all its processes so far.
        doomed: processes that chaos kills.
    """

    def __init__(self, settings: DemoSettings, workload: Workload, group: str, start: Start) -> None:
        self._settings = settings
        self._workload = workload
        self._group = group
        self._start = start
        self._prefix = new_prefix()
        self._memory = -1
        self._start_ns = 0
        self.coordinator: list[Child] = []
        self.engines: list[Child] = []
        self.frontends: list[Child] = []
        self.lives: list[list[Child]] = []
        self.doomed: set[Child] = set()

    def start(self) -> None:
        """Starts all, and gives the coordinator its orders."""
        s = self._settings
        self.coordinator = [self._start("the coordinator", "demo.coordinator", ())]
        computes = s.engine == "torch"
        if computes:
            self._memory = os.memfd_create("dpshm-ranks", 0)  # PyTorch's ranks meet in an empty file
        elif s.waves:
            self._memory = lockstep.create_memory(s.engines)
        module, fds = ("torch.engine" if computes else "demo.engine"), (self._memory,) * (self._memory >= 0)
        try:
            self.engines = [self._start(f"engine {i}", module, fds) for i in range(s.engines)]
        finally:
            if self._memory >= 0:
                os.close(self._memory)
        self.frontends = [self._start(f"front-end {i}", "demo.frontend", ()) for i in range(s.frontends)]
        self.lives = [[child] for child in self.frontends]
        self._order_coordinator()

    def order(self) -> None:
        """Gives the others their orders, once there is a board."""
        s = self._settings
        if s.stats == "pub":
            broadcaster = self._start("the broadcaster", "demo.broadcast", ())
            broadcaster.tell(BroadcastSettings(os.getpid(), self._prefix, s.engines))
        for i in range(s.engines):
            self._order_engine(i)
        for i in range(s.frontends):
            self._order_frontend(i, self._workload.shares[i])

    def go(self) -> int:
        """Gives the front-ends the start; returns time 0, CLOCK_MONOTONIC ns."""
        self._start_ns = time.monotonic_ns() + int(LEAD_S * 1e9)
        for child in self.frontends:
            child.tell(Go(self._start_ns))
        return self._start_ns

    def of_role(self, role: str) -> list[Child]:
        """The present processes of a role: engine, front-end or coordinator."""
        return {"engine": self.engines, "front-end": self.frontends, "coordinator": self.coordinator}[role]

    def start_again(self, role: str, number: int) -> None:
        """Starts the successor of a process that was killed, and gives it its orders."""
        processes = self.of_role(role)
        processes[number] = self._start(processes[number].name, f"demo.{role.replace('-', '')}", ())
        if role == "coordinator":
            self._order_coordinator()
        elif role == "engine":
            self._order_engine(number)
        else:
            self.lives[number].append(processes[number])
            start_ns = time.monotonic_ns() + int(SUCCESSOR_LEAD_S * 1e9)
            passed_s = (start_ns - self._start_ns) / 1e9
            self._order_frontend(number, arrivals_from(self._workload.shares[number], passed_s, self._repeat_s))
            processes[number].tell(Go(start_ns))

    @property
    def _repeat_s(self) -> float:
        return self._workload.seconds if self._settings.keep else 0.0

    def _order_coordinator(self) -> None:
        s = self._settings
        order = CoordinatorSettings(os.getpid(), self._group, s.engines, waves=s.waves)
        if s.chaos:
            order.stall_timeout_s = STALL_TIMEOUT_S
        self.coordinator[0].tell(order)

    def _order_engine(self, i: int) -> None:
        s = self._settings
        order = EngineSettings(
            *(os.getpid(), self._group, self._prefix, s.stats, i, s.engines, s.frontends),
            lockstep_fd=self._memory,
        )
        order.block_tokens = self._workload.block_tokens if s.engine == "sim" else 0  # PyTorch's keeps no prefix
        order.prefix_index = s.prefix_index and s.stats == "board"
        self.engines[i].tell(order)

    def _order_frontend(self, i: int, share: Share) -> None:
        s = self._settings
        order = FrontendSettings(
            *(os.getpid(), self._group, self._prefix, s.stats, s.policy, i, s.engines, s.frontends),
            arrivals=share,
        )
        order.block_tokens = self._workload.block_tokens
        order.repeat_s = self._repeat_s
        order.retries = s.chaos or s.keep  # who practises drains ranks, scales and kills
        order.first_id = len(self.lives[i]) << 32
        self.frontends[i].tell(order)


def arrivals_from(share: Share, passed_s: float, repeat_s: float) -> Share:
    """What is left of a front-end's arrivals, timed from then on.

    Args:
        share: its arrivals.
        passed_s: the time since time 0.
        repeat_s: the arrivals begin again after so many seconds; 0: they do not.
    """
    if repeat_s:
        passed_s %= repeat_s
    later = [(arrival[0] - passed_s, *arrival[1:]) for arrival in share if arrival[0] >= passed_s]
    if repeat_s:
        again_s = repeat_s - passed_s
        later += [(arrival[0] + again_s, *arrival[1:]) for arrival in share if arrival[0] < passed_s]
    return later
