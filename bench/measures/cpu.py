"""CPU per update: the CPU time that an update costs in all processes together, at full speed.

Engines publish as fast as they can, and front-ends receive. The figure is the CPU time of every thread of every
process, from the first update until the last one has arrived: engines, the peer's own processes, front-ends. Full
speed favours the broadcast, which then receives many messages at each wake-up. At a real rate each message costs a
wake-up of its own (see `middle_cpu_us` of freshness).
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from bench.baselines import Spec, Start, engine_end, frontend_end
from bench.processes import Line, Worker, cpu_ns

ARRIVAL_TIMEOUT_S = 60.0
LOOK_MS = 20


def cpu_per_update(start: Start, *, updates: int, engines: int = 8, frontends: int = 4) -> dict[str, float]:
    """Measures one peer once; microseconds of CPU per update.

    Args:
        start: the peer.
        updates: number of updates, over all engines.
        engines: processes that publish.
        frontends: processes that listen.
    """
    count = -(-updates // engines)
    with ExitStack() as stack:
        middle = start(engines, frontends)
        stack.callback(middle.close)
        readers = [stack.enter_context(Worker(listen, middle.spec, f, count)) for f in range(frontends)]
        writers = [stack.enter_context(Worker(flood, middle.spec, e, count)) for e in range(engines)]
        for worker in (*writers, *readers):
            worker.wait_ready()
        groups = {
            "engines": [worker.pid for worker in writers],
            "middle": middle.pids,
            "frontends": [worker.pid for worker in readers],
        }
        before = {name: sum(map(cpu_ns, pids)) for name, pids in groups.items()}
        for worker in (*readers, *writers):
            worker.tell()
        for worker in (*writers, *readers):
            worker.result()
        spent = {
            name: (sum(map(cpu_ns, pids)) - before[name]) / 1e3 / (count * engines)
            for name, pids in groups.items()
        }
        for worker in (*writers, *readers):
            worker.open_doorbell()
    return {"us": sum(spent.values()), **spent, "updates": count * engines}


def flood(line: Line, spec: Spec, dp_rank: int, count: int) -> None:
    """An engine that publishes its update's number as its waiting count."""
    end = engine_end(spec, dp_rank)
    try:
        end.publish(0, 0)
        line.ready()
        publish = end.publish
        for number in range(1, count + 1):
            publish(number, 0)
        line.answer(None)
        line.expect()
    finally:
        end.close()


def listen(line: Line, spec: Spec, index: int, count: int) -> None:
    """A front-end that takes in what is sent to it until it knows of the last update of every engine."""
    end = frontend_end(spec, index)
    try:
        line.ready()
        deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
        while any(end.waiting(item) != count for item in end.known()):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"front-end {index} did not hear of the last updates in {ARRIVAL_TIMEOUT_S:g} s"
                )
            end.wait(LOOK_MS)
        line.answer(None)
        line.expect()
    finally:
        end.close()
