"""The coordinator at rest: its start-up time, its memory, and its CPU time while the group is idle.

- *startup*: from the constructor's call until the addresses are known.
- *rss*: its resident memory and its share of it (PSS), with all engines and front-ends there.
- *idle_cpu*: its CPU time over a while in which no engine publishes and no front-end decides, in percent of
  one core.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, closing

from bench.baselines import Spec, Start, engine_end, frontend_end
from bench.baselines.board import Board
from bench.processes import Line, Worker, cpu_ns, memory

SETTLE_S = 3.0  # the last message received is old by now


def board_startup(engines: int = 8) -> dict[str, float]:
    """Seconds, of our coordinator process."""
    with closing(Board(engines, 4)) as board:
        return {"s": board.startup_s}


def at_rest(
    start: Start, *, engines: int = 8, frontends: int = 4, seconds: float = 5
) -> dict[str, dict[str, float]]:
    """Measures one peer's process once: its memory in MB, and its CPU time at rest in percent of a core."""
    with ExitStack() as stack:
        middle = start(engines, frontends)
        stack.callback(middle.close)
        workers = [
            *(stack.enter_context(Worker(sit, middle.spec, "engine", e)) for e in range(engines)),
            *(stack.enter_context(Worker(sit, middle.spec, "front-end", f)) for f in range(frontends)),
        ]
        for worker in workers:
            worker.wait_ready()
        time.sleep(SETTLE_S)
        before, began = sum(map(cpu_ns, middle.pids)), time.monotonic_ns()
        time.sleep(seconds)
        spent = sum(map(cpu_ns, middle.pids)) - before
        percent = 100 * spent / (time.monotonic_ns() - began)
        held = memory(middle.pids[0])
        for worker in workers:
            worker.open_doorbell()
    return {"rss": {"rss_mb": held.rss_mb, "pss_mb": held.pss_mb}, "idle_cpu": {"percent": percent}}


def sit(line: Line, spec: Spec, role: str, index: int) -> None:
    """An engine or a front-end that is there and does nothing."""
    end = engine_end(spec, index) if role == "engine" else frontend_end(spec, index)
    try:
        line.ready()
    finally:
        end.close()
