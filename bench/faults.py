"""``python -m bench faults``: how soon processes that die or stop are left out of routing.

The coordinator and each engine and front-end is a process. This process is the front-end that observes: it makes
decisions, and its policy prefers the victim for as long as it may be chosen. So the times are those that a request
would see. Times are in milliseconds, from just before the signal is sent until the first decision that

- *dead_engine*: no longer may choose an engine that was killed (SIGKILL);
- *dead_frontend*: no longer counts what a killed front-end had booked and never sent;
- *dead_engine_alone*: the same as *dead_engine* while no coordinator lives: front-ends test the locks themselves;
- *stalled_engine*: no longer may choose an engine that was stopped (SIGSTOP) with work, *less* the stall timeout;
- *moving_engine*: may choose it again after SIGCONT.

A process with gigabytes mapped takes the kernel longer to end, and holds its lock until then: ``--ballast-mb``.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from bench.baselines.board import stderr_to
from bench.comparison import machine_facts, progress
from bench.distribution import quantiles
from bench.processes import Line, Worker
from dpshm import CoordinatorProcess, Engine, Frontend
from dpshm.board.sweep import sweep
from dpshm.policies import Request, View

ENGINES = 8
BOOKINGS = 5
STALL_TIMEOUT_S = 0.5
LOOK_S = 0.0002
"""Pause between two decisions, which leaves the core to the coordinator."""
TIMEOUT_S = 30.0
AIM_MS = 100.0
AIMS = {"dead_engine": AIM_MS, "dead_frontend": AIM_MS}
Say = Callable[[str], None]


def be_engine(line: Line, group: str, dp_rank: int, ballast_mb: int) -> None:
    """An engine with a request waiting, which publishes a few hundred times a second."""
    ballast = mmap.mmap(-1, max(1, ballast_mb) << 20)
    if ballast_mb:
        for at in range(0, len(ballast), mmap.PAGESIZE):
            ballast[at] = 1
    with Engine.attach(group, dp_rank) as engine:
        engine.publish(waiting=1, running=0)
        line.ready()
        while not line.told():
            engine.poll(3)
            engine.publish(waiting=1, running=0)


def be_frontend(line: Line, group: str) -> None:
    """A front-end with bookings for rank 0 that it never sends."""
    with Frontend.attach(group, owner="victim") as frontend:
        routes = [frontend.route(100, dp_rank=0) for _ in range(BOOKINGS)]
        line.ready()
        for route in routes:
            route.cancel()


class Observer:
    """The front-end that observes."""

    def __init__(self, group: str) -> None:
        self._wanted = 0
        self._may = False
        self._requests = 0
        self._frontend = Frontend.attach(group, owner="observer", policy=self._policy)

    def _policy(self, view: View, _: Request) -> int:
        ranks = list(view.ranks)
        self._may = self._wanted in ranks
        self._requests = int(view.requests[0])
        return self._wanted if self._may else int(ranks[0])

    def may_choose(self, dp_rank: int) -> bool:
        """Whether a decision made now may choose a rank."""
        self._wanted = dp_rank
        self._frontend.choose()
        return self._may

    def requests(self) -> int:
        """How many requests a decision made now counts at rank 0."""
        self._frontend.choose()
        return self._requests

    def close(self) -> None:
        """Leaves."""
        self._frontend.close()


def time_until(condition: Callable[[], bool]) -> float:
    """Milliseconds until the condition holds.

    Raises:
        TimeoutError: the condition did not hold in time.
    """
    began = time.monotonic_ns()
    while not condition():
        if time.monotonic_ns() - began > TIMEOUT_S * 1e9:
            raise TimeoutError(f"not seen within {TIMEOUT_S:g} s")
        time.sleep(LOOK_S)
    return (time.monotonic_ns() - began) / 1e6


class Group:
    """The group under test, and the faults that are done to it."""

    def __init__(self, stack: ExitStack, ballast_mb: int) -> None:
        self._ballast_mb = ballast_mb
        self._name = f"faults-{os.getpid()}"
        stack.callback(sweep, self._name)  # whose coordinator was killed leaves its board
        with tempfile.TemporaryFile() as log, stderr_to(log):  # its log of each death is not part of the report
            self._coordinator = CoordinatorProcess(
                group=self._name, dp_size=ENGINES, waves=False, stall_timeout_s=STALL_TIMEOUT_S
            )
        stack.callback(self._coordinator.close)
        self._engines: list[Worker] = []
        stack.callback(self._close_engines)
        for dp_rank in range(ENGINES):
            self._engines.append(self._start_engine(dp_rank))
        self._observer = Observer(self._name)
        stack.callback(self._observer.close)
        self._rng = np.random.default_rng(1)

    def _start_engine(self, dp_rank: int) -> Worker:
        worker = Worker(be_engine, self._name, dp_rank, self._ballast_mb)
        try:
            worker.wait_ready()
        except BaseException:
            worker.close()
            raise
        worker.tell()
        return worker

    def _close_engines(self) -> None:
        for worker in self._engines:
            worker.open_doorbell()
        for worker in self._engines:
            worker.close()

    def _settle(self) -> None:
        """Waits for a random time, so that the watch's rounds do not fall into step with these."""
        time.sleep(float(self._rng.uniform(0.02, 0.12)))

    def kill_engine(self, number: int) -> float:
        """Kills an engine and times it."""
        dp_rank = number % ENGINES
        time_until(lambda: self._observer.may_choose(dp_rank))
        self._settle()
        os.kill(self._engines[dp_rank].pid, signal.SIGKILL)
        ms = time_until(lambda: not self._observer.may_choose(dp_rank))
        self._engines.pop(dp_rank).close()
        self._engines.insert(dp_rank, self._start_engine(dp_rank))
        return ms

    def kill_frontend(self, _: int) -> float:
        """Kills a front-end and times it."""
        before = self._observer.requests()
        with Worker(be_frontend, self._name) as victim:
            victim.wait_ready()
            time_until(lambda: self._observer.requests() == before + BOOKINGS)
            self._settle()
            os.kill(victim.pid, signal.SIGKILL)
            return time_until(lambda: self._observer.requests() == before)

    def stop_engine(self, number: int) -> tuple[float, float]:
        """Stops and continues an engine: the time until it is skipped, less the timeout, and until it is back."""
        dp_rank = number % ENGINES
        time_until(lambda: self._observer.may_choose(dp_rank))
        self._settle()
        os.kill(self._engines[dp_rank].pid, signal.SIGSTOP)
        skipped = time_until(lambda: not self._observer.may_choose(dp_rank))
        os.kill(self._engines[dp_rank].pid, signal.SIGCONT)
        return skipped - STALL_TIMEOUT_S * 1e3, time_until(lambda: self._observer.may_choose(dp_rank))

    def kill_coordinator(self) -> None:
        """Kills the coordinator: from now on no process updates the marks."""
        self._coordinator.proc.kill()
        self._coordinator.proc.join()


def run(kills: int, stalls: int, ballast_mb: int, say: Say) -> dict[str, Any]:
    """Measures everything."""
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        say("starting")
        group = Group(stack, ballast_mb)
        for name, count, measure in (
            ("dead_engine", kills, group.kill_engine),
            ("dead_frontend", kills, group.kill_frontend),
            ("stopped_engine", stalls, group.stop_engine),
        ):
            say(f"{name}: {count} times")
            values: list[Any] = []
            for number in range(count):
                values.append(measure(number))
                if (number + 1) % 50 == 0:
                    say(f"{name}: {number + 1}")
            if name == "stopped_engine":
                times["stalled_engine"], times["moving_engine"] = map(list, zip(*values, strict=True))
            else:
                times[name] = values
        group.kill_coordinator()
        say("dead_engine_alone: the coordinator is gone")
        times["dead_engine_alone"] = [group.kill_engine(number) for number in range(max(1, kills // 4))]
    figures = {name: quantiles(values) | {"max": max(values)} for name, values in times.items()}
    return {
        "machine": machine_facts(),
        "stall_timeout_s": STALL_TIMEOUT_S,
        "ballast_mb": ballast_mb,
        "ms": figures,
        "reached": {name: figures[name]["p99"] < aim for name, aim in AIMS.items()},
        "load_after": os.getloadavg()[0],
    }


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m bench faults", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--kills", type=int, default=200, help="engines, and front-ends, to kill (200)")
    parser.add_argument("--stalls", type=int, default=25, help="engines to stop (25)")
    parser.add_argument("--ballast-mb", type=int, default=0, help="memory that each engine holds (0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(argv)
    result = run(max(1, options.kills), max(1, options.stalls), max(0, options.ballast_mb), progress())
    if options.json:
        json.dump(result, sys.stdout, indent=1)
        print()
        return 0
    print(f"{'ms':20} {'p50':>8} {'p99':>8} {'max':>8} {'times':>6}")
    for name, figure in result["ms"].items():
        aim = f"  p99 below {AIMS[name]:g}: {'yes' if result['reached'][name] else 'NO'}" if name in AIMS else ""
        print(
            f"{name:20} {figure['p50']:8.2f} {figure['p99']:8.2f} {figure['max']:8.2f} {figure['count']:6.0f}{aim}"
        )
    return 0
