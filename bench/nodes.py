"""``python -m bench nodes``: how soon a front-end sees what an engine on another node published, and the cost.

Two nodes are namespaces of this machine, joined by a veth pair (`tests.nodes`, needs root). Engines on the second
node publish at a steady rate; the coordinator on the first writes their rows to its board; a process beside it
reads the board. All read one clock, so the time of a publish can travel in its row.

*CPU* is of all processes: the engines, less what the same loop takes when it publishes to a board beside it, and
the coordinator, less what it takes when nothing comes. It has the work of libzmq's threads and of the kernel in
these processes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack, closing
from typing import Any

from bench.distribution import quantiles
from dpshm.board.board import Board
from tests.nodes.machines import two_nodes, why_not
from tests.support import Remote, wait_until

LOOK_S = 0.00005
"""Pause between two looks at the board."""
_BESIDE = "engine = Engine.attach('nodes', rank)"
_AFAR = "from dpshm.engine.remote import RemoteEngine\nengine = RemoteEngine.connect(addresses, rank, waves=False)"
_PUBLISH = """
pause_s = 1 / rate
began_cpu, began, count = time.process_time(), time.monotonic(), 0
while not told():
    count += 1
    time.sleep(max(0.0, began + count * pause_s - time.monotonic()))
    engine.publish(waiting=0, running=count & 7, prefill_backlog=time.monotonic_ns())
cpu_s = time.process_time() - began_cpu
"""


def look(board: Board, ranks: int, seconds: float) -> list[int]:
    """How old each publication was when it was seen first, in ns."""
    ages: list[int] = []
    last = board.prefill_backlog[:ranks].tolist()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(LOOK_S)
        for rank, stamp in enumerate(board.prefill_backlog[:ranks].tolist()):
            if stamp != last[rank]:
                last[rank] = stamp
                ages.append(time.monotonic_ns() - stamp)
    return ages


def cpu_s(pid: int) -> float:
    """What a process has used so far."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(*, afar: bool, ranks: int, rate: float, seconds: float) -> dict[str, Any]:
    """One run.

    Args:
        afar: the engines are on the other node; else beside the board.
        ranks: engines.
        rate: publications a second of all together.
        seconds: for how long.
    """
    with ExitStack() as stack:

        def using(x: Any) -> Any:
            return stack.enter_context(closing(x))

        *nodes, cable = two_nodes(using)
        coordinator: Remote = using(nodes[0].process())
        settings = {"group": "nodes", "dp_size": ranks, "dp_size_local": 0, "waves": False, "insecure": True}
        coordinator.run("coordinator = Coordinator(**settings)", settings=settings | {"host": cable.addresses[0]})
        addresses = coordinator.eval("coordinator.engine_addresses")
        engines: list[Remote] = [using(nodes[1 if afar else 0].process()) for _ in range(ranks)]
        for rank, engine in enumerate(engines):
            engine.run(_AFAR if afar else _BESIDE, rank=rank, addresses=addresses)
        wait_until(
            lambda: coordinator.eval("coordinator.board.snapshot()['verdict'].tolist()") == ["alive"] * ranks
        )
        reader: Remote = using(nodes[0].process())
        reader.run("from bench.nodes import look\nboard = Board.attach('nodes')")
        time.sleep(1)
        idle = -cpu_s(coordinator.pid)
        time.sleep(2)
        idle = (idle + cpu_s(coordinator.pid)) / 2
        for engine in engines:
            engine.begin(_PUBLISH, rate=rate / ranks)
        time.sleep(0.5)
        began, cpu = time.monotonic(), -cpu_s(coordinator.pid)
        ages = reader.eval(f"look(board, {ranks}, {seconds})")
        cpu += cpu_s(coordinator.pid) - idle * (time.monotonic() - began)
        lasted = time.monotonic() - began
        published = sum(engine.eval("count") for engine in engines)
        engine_us = 1e6 * sum(engine.eval("cpu_s") for engine in engines) / published
        seen = len(ages)
        of = quantiles([age / 1e6 for age in ages])
        return {
            "afar": afar,
            "ranks": ranks,
            "seen_per_s": seen / lasted,
            "engine_us": engine_us,
            "p50_ms": of["p50"],
            "p99_ms": of["p99"],
            "p999_ms": of["p99.9"],
            "coordinator_us": 1e6 * cpu / (seen or 1),
        }


def main(argv: list[str]) -> int:
    """Runs the study."""
    parser = argparse.ArgumentParser("python -m bench nodes", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4, help="engines on the other node")
    parser.add_argument("--rate", type=float, default=1600, help="publications a second of all together")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(argv)
    if (reason := why_not()) is not None:
        print(reason, file=sys.stderr)
        return 2
    sizes = {"ranks": options.ranks, "rate": options.rate, "seconds": options.seconds}
    rounds = [[measure(afar=afar, **sizes) for afar in (False, True)] for _ in range(options.rounds)]
    if options.json:
        json.dump({"load": os.getloadavg(), "rounds": rounds}, sys.stdout, indent=1)
        print()
        return 0
    for beside, afar in rounds:
        own_us = afar["engine_us"] - beside["engine_us"]
        print(
            f"{afar['seen_per_s']:.0f} updates/s seen: p50 {afar['p50_ms']:.2f} ms, p99 {afar['p99_ms']:.2f} ms, "
            f"p99.9 {afar['p999_ms']:.2f} ms (beside the board {beside['p50_ms']:.3f}, {beside['p99_ms']:.2f}); "
            f"CPU {own_us:.0f} us in the engine and {afar['coordinator_us']:.0f} us in the coordinator an update"
        )
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    return 0
