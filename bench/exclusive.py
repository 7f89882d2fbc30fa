"""Measures exclusive mode: how often front-ends that decide at the same moment use the same state.

    python bench/exclusive.py [--frontends 8] [--rounds 1000]

There are as many front-ends as engines, each a process. In each round all of them route one request at the same
instant of the clock; the requests of a round are done before the next. Each front-end notes how many decisions had
been booked by then. If two note the same number, neither saw the other's booking: they decided from the same
state. The table gives the share of such decisions, with exclusive mode off and on. (More front-ends than
processors cannot decide at the same moment. The number is read just after the board, so the figure without the
lock is a lower bound.)
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from multiprocessing.connection import Connection

from dpshm import Coordinator, Engine, Frontend
from dpshm.policies import Request, View, least_loaded

GAP_S = 0.004
"""Time from one round to the next."""


def decide(group: str, exclusive: bool, rounds: int, start_s: float, out: Connection) -> None:
    """Runs one front-end, which decides at each round's instant."""
    chosen = []
    seen = 0

    def watched(view: View, request: Request) -> int:
        nonlocal seen
        seen = int(frontend.board.routed.sum())
        return least_loaded(view, request)

    with Frontend.attach(group, exclusive=exclusive, policy=watched) as frontend:
        out.send("ready")
        for k in range(rounds):
            at_s = start_s + k * GAP_S
            time.sleep(max(0.0, at_s - time.monotonic() - 0.0005))
            while time.monotonic() < at_s:
                pass
            began_s = time.monotonic()
            route = frontend.route(10)
            chosen.append((seen, began_s - at_s, time.monotonic() - began_s))
            time.sleep(max(0.0, at_s + GAP_S / 2 - time.monotonic()))
            route.done()
    out.send(chosen)


def measure(size: int, rounds: int, exclusive: bool) -> tuple[float, float, int]:
    """Share of decisions from a state used before, median decision time in us, and number of complete rounds."""
    group = f"bench-exclusive-{os.getpid()}"
    with Coordinator(group=group, dp_size=size) as _:
        engines = [Engine.attach(group, rank) for rank in range(size)]
        context = multiprocessing.get_context("spawn")
        start_s = time.monotonic() + 8.0
        pipes = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            context.Process(target=decide, args=(group, exclusive, rounds, start_s, theirs), daemon=True).start()
            pipes.append(ours)
        for pipe in pipes:
            pipe.recv()
        if time.monotonic() > start_s:
            raise SystemExit("the processes took more than 8 s to start: try again on a machine with less to do")
        found = [pipe.recv() for pipe in pipes]
        for engine in engines:
            engine.close()
    met = together = 0
    durations: list[float] = []
    for decisions in zip(*found, strict=True):
        if max(late for _, late, _ in decisions) > GAP_S / 4:
            continue  # the kernel suspended a front-end, so the decisions were not simultaneous
        together += 1
        met += size - len({state for state, _, _ in decisions})
        durations += [duration for _, _, duration in decisions]
    durations.sort()
    median_us = durations[len(durations) // 2] * 1e6 if durations else float("nan")
    return met / max(1, together * size), median_us, together


def main() -> None:
    """Measures both modes and prints the table."""
    parser = argparse.ArgumentParser(description="Measures what exclusive mode gains.")
    parser.add_argument("--frontends", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1000)
    given = parser.parse_args()
    print("| exclusive | decisions from the same state | decision, median us | rounds |\n|---|---|---|---|")
    for exclusive in (False, True):
        met, median_us, rounds = measure(given.frontends, given.rounds, exclusive)
        print(f"| {'on' if exclusive else 'off'} | {met:.2%} | {median_us:.1f} | {rounds} |")


if __name__ == "__main__":
    main()
