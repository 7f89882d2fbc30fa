"""``python -m bench nodes``: how soon a front-end sees what an engine on another node published, and the cost.

Two nodes are namespaces of this machine, joined by a veth pair (`tests.nodes`, needs root). Engines on the second
node publish at a steady rate; the coordinator on the first writes their rows to its board; a process beside it
reads the board. All read one clock, so the time of a publish can travel in its row.

With ``--relay`` each node has a board, and the rows go through relays from one to the other.

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
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

from bench.distribution import quantiles
from bench.processes import cpu_ns
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
    """What the living threads of a process have used so far."""
    return cpu_ns(pid) / 1e9


def reader_beside(using: Callable[[Any], Any], node: Any, coordinator: Remote, ranks: int) -> Remote:
    """A process of a coordinator's node that reads the board, once all ranks are alive there."""
    verdicts = "coordinator.board.snapshot()['verdict'].tolist()"
    wait_until(lambda: coordinator.eval(verdicts) == ["alive"] * ranks)
    reader: Remote = using(node.process())
    reader.run("from bench.nodes import look\nboard = Board.attach('nodes')")
    return reader


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
        reader = reader_beside(using, nodes[0], coordinator, ranks)
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


def measure_relay(*, ranks: int, rate: float, seconds: float) -> dict[str, Any]:
    """One run through relays: engines beside the second node's board, and the reader beside the head's.

    Args:
        ranks: engines.
        rate: publications a second of all together.
        seconds: for how long.
    """
    with ExitStack() as stack:

        def using(x: Any) -> Any:
            return stack.enter_context(closing(x))

        *nodes, cable = two_nodes(using)
        settings = {"group": "nodes", "dp_size": ranks, "nodes": 2, "waves": False, "insecure": True}
        coordinators: list[Remote] = [using(node.process()) for node in nodes]
        code = "coordinator = Coordinator(**settings)"
        coordinators[0].run(code, settings=settings | {"host": cable.addresses[0]})
        head = coordinators[0].eval("coordinator.head_addresses")
        coordinators[1].run(code, settings=settings | {"node": 1, "head": head})
        engines: list[Remote] = [using(nodes[1].process()) for _ in range(ranks)]
        for rank, engine in enumerate(engines):
            engine.run(_BESIDE, rank=rank)
        reader = reader_beside(using, nodes[0], coordinators[0], ranks)

        def cpu() -> list[float]:
            return [cpu_s(coordinator.pid) for coordinator in coordinators]

        time.sleep(1)
        before, began = cpu(), time.monotonic()
        time.sleep(3)
        idle = [(now - then) / (time.monotonic() - began) for now, then in zip(cpu(), before, strict=True)]
        for engine in engines:
            engine.begin(_PUBLISH, rate=rate / ranks)
        time.sleep(0.5)
        before, began = cpu(), time.monotonic()
        ages = reader.eval(f"look(board, {ranks}, {seconds})")
        lasted = time.monotonic() - began
        busy = [(now - then) / lasted for now, then in zip(cpu(), before, strict=True)]
        of = quantiles([age / 1e6 for age in ages])
        seen = len(ages) / lasted
        return {
            "seen_per_s": seen,
            "p50_ms": of["p50"],
            "p99_ms": of["p99"],
            "p999_ms": of["p99.9"],
            "idle_percent": [100 * share for share in idle],
            "tell_us": 1e6 * (busy[1] - idle[1]) / seen,
            "hear_us": 1e6 * (busy[0] - idle[0]) / seen,
        }


def print_relay(run: dict[str, Any]) -> None:
    """Prints a run through relays."""
    print(
        f"{run['seen_per_s']:.0f} updates/s seen through the relays: p50 {run['p50_ms']:.2f} ms, p99 "
        f"{run['p99_ms']:.2f} ms, p99.9 {run['p999_ms']:.2f} ms; CPU above idle {run['tell_us']:.0f} us in the "
        f"teller and {run['hear_us']:.0f} us in the hearer an update; idle, coordinators take "
        f"{run['idle_percent'][1]:.1f} and {run['idle_percent'][0]:.1f} % of a core"
    )


def main(argv: list[str]) -> int:
    """Runs the study."""
    parser = argparse.ArgumentParser("python -m bench nodes", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4, help="engines on the other node")
    parser.add_argument("--rate", type=float, default=1600, help="publications a second of all together")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--relay", action="store_true", help="a board on each node, and a relay between them")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(argv)
    if (reason := why_not()) is not None:
        print(reason, file=sys.stderr)
        return 2
    sizes = {"ranks": options.ranks, "rate": options.rate, "seconds": options.seconds}
    if options.relay:
        for _ in range(options.rounds):
            print_relay(measure_relay(**sizes))
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        return 0
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
