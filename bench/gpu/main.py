"""``python -m bench gpu``: measures reporting, freshness and waking with lockstep ranks that compute.

The ranks are real (`dpshm.sim.torch.engine`). Each has a GPU of its own if there are enough; else several share
one, or all run on the CPU. The coordinator is a process, and this process is the front-end. In this order, on one
set of ranks: `bench.gpu.steps`, `bench.gpu.wakes`, `bench.gpu.fault`.

Freshness runs from the call of `publish()` until the reader sees that report, or a newer one of the same rank; and
from its last store.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.gpu.driver import Driver, Stuck
from bench.processes import Worker
from dpshm import CoordinatorProcess

try:
    from bench.gpu.fault import measure_fault
    from bench.gpu.rank import watch
    from bench.gpu.ranks import start_ranks
    from bench.gpu.show import show
    from bench.gpu.steps import measure_steps
    from bench.gpu.wakes import measure_wakes
except ModuleNotFoundError as e:
    sys.exit(f"python -m bench gpu needs PyTorch ({e}): pip install 'dpshm[torch]'")


def run(dp_size: int, steps: int, cycles: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Runs all measurements."""
    group = f"bench-gpu-{os.getpid()}"
    with ExitStack() as stack:
        coordinator = CoordinatorProcess(group=group, dp_size=dp_size)
        stack.callback(coordinator.close)
        tell("starting the ranks")
        ranks, prefix, places = start_ranks(stack, group, dp_size, steps)
        reader = stack.enter_context(Worker(watch, group, dp_size))
        reader.wait_ready()
        driver = Driver(group, dp_size)
        stack.callback(driver.close)
        driver.connect(prefix)
        driver.wait(driver.paused, "the ranks to be idle")
        result: dict[str, Any] = {"ranks": places, "cores": os.cpu_count()}
        tell(f"{steps} steps under a steady load, alternating")
        result["steps"] = measure_steps(driver, ranks, reader, steps)
        tell(json.dumps(result["steps"]))
        result["wake"] = measure_wakes(driver, ranks, cycles, tell)
        tell(json.dumps(result["wake"]))
        tell("killing a rank in mid-step")

        def restart() -> str:
            new, new_prefix_, _ = start_ranks(stack, group, dp_size, 0)
            ranks[:] = new
            return new_prefix_

        result["fault"] = measure_fault(driver, tuple(ranks), restart)
        for rank in ranks:
            rank.tell("end")
        for rank in ranks:
            rank.result()
    return result


def main(argv: list[str]) -> int:
    """Runs what the command line says; gives the exit status."""
    parser = argparse.ArgumentParser(
        "python -m bench gpu", description="Lockstep ranks that compute (extra: torch)."
    )
    parser.add_argument("--ranks", type=int, default=2, help="how many; one a GPU if there are as many")
    parser.add_argument("--steps", type=int, default=6000, help="steps under a steady load")
    parser.add_argument("--cycles", type=int, default=520, help="pause/wake cycles")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result there too")
    options = parser.parse_args(argv)
    began = time.monotonic()

    def tell(text: str) -> None:
        sys.stderr.write(f"bench gpu: {time.monotonic() - began:.0f} s: {text}\n")

    try:
        result = run(options.ranks, options.steps, options.cycles, tell)
    except Stuck as e:
        sys.stderr.write(f"bench gpu: stuck: {e}\n")
        return 1
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(show(result))
    return 0
