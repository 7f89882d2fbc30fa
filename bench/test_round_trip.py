"""Between two processes: an update there and an answer back, readers idle, and under busy writers.

Our process publishes as rank 0; another process, a front-end and rank 1, sees it and publishes its number back;
we see that. One figure a round trip; p50, p99 and p99.9 are in the benchmark's extra information.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import pytest

from bench.baselines import Spec, board, engine_end, flock, frontend_end, pub
from bench.distribution import quantiles
from bench.processes import Line, Worker, all_cores, leave_reader_core, use_cores, use_reader_core

STARTS = {"board": board.start, "flock": flock.start, "pub_unlimited": pub.start_every(0)}
ROUND_TRIPS = 300
ENGINES = 8


def echo(line: Line, spec: Spec) -> None:
    """The other process."""
    with closing(frontend_end(spec, 1)) as seen, closing(engine_end(spec, 1)) as answer:
        line.ready()
        last = 0
        while not line.told():
            for _ in range(200):
                number = seen.waiting(seen.known()[0])
                if number != last:
                    answer.publish(number, 0)
                    last = number


def write_on(line: Line, spec: Spec, dp_rank: int) -> None:
    """A busy writer: a report every 100 us, of another rank."""
    with closing(engine_end(spec, dp_rank)) as end:
        line.ready()
        number = 0
        while not line.told():
            number = (number + 1) % 1000
            end.publish(number, 1)
            time.sleep(1e-4)


@pytest.mark.benchmark(group="round trip")
@pytest.mark.parametrize("writers", [0, 2], ids=["idle", "busy writers"])
@pytest.mark.parametrize("peer", STARTS)
def test_round_trip(benchmark: Any, using: Any, peer: str, writers: int) -> None:
    """There and back."""
    leave_reader_core()
    try:
        spec = using(STARTS[peer](ENGINES, 2)).spec
        others = [using(Worker(echo, spec)), *(using(Worker(write_on, spec, 2 + i)) for i in range(writers))]
        seen, ours = using(frontend_end(spec, 0)), using(engine_end(spec, 0))
        for worker in others:
            worker.wait_ready()
            worker.tell()
        use_reader_core()
        number, us = 0, []

        def round_trip() -> None:
            nonlocal number
            number += 1
            began = time.perf_counter_ns()
            ours.publish(number, 0)
            while seen.waiting(seen.known()[1]) != number:
                pass
            us.append((time.perf_counter_ns() - began) / 1e3)

        benchmark.pedantic(round_trip, rounds=ROUND_TRIPS, iterations=1, warmup_rounds=20)
        benchmark.extra_info.update(quantiles(us))
        for worker in others:
            worker.open_doorbell()
    finally:
        use_cores(all_cores())
