"""The whole comparison: every figure, every peer, in rounds.

All peers run on one machine in one run. A round measures each peer once, in a rotating order, and ratios are taken
within rounds (`bench.distribution`). Each file of `bench.measures` describes its measurement.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zmq

from bench.baselines import Start, board, flock, pub
from bench.baselines.vllm import Vllm, VllmError, VllmInterpreter
from bench.distribution import compare
from bench.measures import cost
from bench.measures.accuracy import accuracy
from bench.measures.cpu import cpu_per_update
from bench.measures.freshness import freshness
from bench.measures.limit import limit
from bench.measures.startup import at_rest, board_startup
from bench.measures.wake import wake
from bench.processes import all_cores, cores, leave_reader_core, use_cores

ENGINES = 8
FRONTENDS = 4
ACCURACY_RATE = 60.0
Result = dict[str, Any]
Record = dict[str, float]


class Sizes(NamedTuple):
    """The sizes of the measurements."""

    rounds: int
    freshness_s: float
    frontends: tuple[int, ...]
    engines: tuple[int, ...]
    batches: int
    fast_updates: int
    slow_updates: int
    vllm_updates: int
    wake_trials: int
    accuracy_s: float
    accuracy_rounds: int
    rest_s: float


FULL = Sizes(5, 3.0, (1, 4, 16), (1, 8, 64, 256, 1024), 300, 1_000_000, 200_000, 40_000, 300, 12.0, 2, 8.0)
QUICK = Sizes(2, 0.4, (1, 4), (8, 64, 1024), 30, 100_000, 10_000, 4_000, 30, 1.0, 1, 0.5)


def run(sizes: Sizes, vllm_python: Path | None, say: Callable[[str], None]) -> Result:
    """Measures everything.

    Args:
        sizes: the sizes of the measurements.
        vllm_python: an interpreter with vLLM, or None.
        say: called with each line of progress.
    """
    result: Result = {"machine": machine(sizes)}
    with ExitStack() as stack:
        stack.callback(use_cores, all_cores())
        peers = Peers(stack, vllm_python, say)
        result["vllm"] = peers.vllm_version
        for name, section in SECTIONS.items():
            say(name)
            section(result, sizes, peers)
    result["machine"]["load_after"] = os.getloadavg()[0]
    return result


def machine(sizes: Sizes) -> Result:
    """The machine, and the sizes of the measurements."""
    return machine_facts() | {"sizes": sizes._asdict()}


def machine_facts() -> Result:
    """The machine and its software."""
    model = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": model[0] if model else platform.machine(),
        "cores": len(cores()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pyzmq": zmq.__version__,
        "libzmq": zmq.zmq_version(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load_before": os.getloadavg()[0],
        "busy_before": busy_share(),
    }


def busy_share(seconds: float = 0.5) -> float:
    """The share of all CPU time that is not idle, while this process does nothing."""

    def spent() -> tuple[int, int]:
        user, nice, system, idle, iowait, *rest = map(int, _lines("/proc/stat")[0].split()[1:9])
        return user + nice + system + sum(rest), idle + iowait

    busy_before, idle_before = spent()
    time.sleep(seconds)
    busy, idle = spent()
    return (busy - busy_before) / max(1, busy - busy_before + idle - idle_before)


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


class Peers:
    """The peers: the function that starts each, by name; vLLM's only if it is installed."""

    def __init__(self, stack: ExitStack, vllm_python: Path | None, say: Callable[[str], None]) -> None:
        self.starts: dict[str, Start] = {
            "board": board.start,
            "flock": flock.start,
            "pub_unlimited": pub.start_every(0),
            "pub_100ms": pub.start,
        }
        self.wave_starts: dict[str, Start] = {"board": board.start_with_waves, "pub_100ms": pub.start}
        self.interpreter: VllmInterpreter | None = None
        self.vllm_startup: list[Record] = []
        self.board_startup: list[Record] = []
        self.vllm_version = "skipped: name an interpreter that has vLLM with --vllm-python"
        if vllm_python is None:
            say(f"vllm: {self.vllm_version}")
            return
        say("vllm: importing")
        try:
            self.interpreter = stack.enter_context(VllmInterpreter(vllm_python))
        except (VllmError, OSError) as e:
            self.vllm_version = f"skipped: {vllm_python} cannot import vLLM: {e}"
            say(f"vllm: {self.vllm_version}")
            return
        self.vllm_version = self.interpreter.version
        # Dense models' coordinator for the counts: without step stamps it publishes on time. The waves' for waves.
        self.starts["vllm"] = self._start_vllm(stack, say, waves=False).serve
        self.wave_starts["vllm"] = self._start_vllm(stack, say, waves=True).serve

    def _start_vllm(self, stack: ExitStack, say: Callable[[str], None], *, waves: bool) -> Vllm:
        assert self.interpreter is not None
        say(f"vllm: starting its coordinator, waves={waves}")
        self.board_startup.append(board_startup())
        vllm = Vllm(self.interpreter, ENGINES, waves=waves)
        stack.callback(vllm.close)
        self.vllm_startup.append({"s": vllm.startup_s})
        return vllm


def in_rounds(rounds: int, measures: Mapping[str, Callable[[], Record]]) -> dict[str, list[Record]]:
    """Calls each function once in a round; each round begins with another one."""
    records: dict[str, list[Record]] = {name: [] for name in measures}
    names = list(measures)
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            records[name].append(measures[name]())
    return records


def _each(
    starts: dict[str, Start], measure: Callable[..., Record], **settings: Any
) -> dict[str, Callable[[], Record]]:
    return {name: partial(measure, start, **settings) for name, start in starts.items()}


# The sections, in the order in which they run. Each adds to the result.


def _limit(result: Result, sizes: Sizes, _: Peers) -> None:
    with reader_core_apart():
        rounds = [limit(20_000) for _ in range(sizes.rounds)]
    result["limit"] = {key: float(np.median([r[key] for r in rounds])) for key in rounds[0]}


def _freshness(result: Result, sizes: Sizes, peers: Peers) -> None:
    by_count: dict[str, Any] = {}
    for count in sizes.frontends:
        rounds = sizes.rounds if count == 1 else max(1, sizes.rounds // 2)
        measures = _each(peers.starts, freshness, engines=ENGINES, seconds=sizes.freshness_s, frontends=count)
        with reader_core_apart():
            by_count[str(count)] = compare(in_rounds(rounds, measures), "p50")
    result["freshness"] = by_count[str(sizes.frontends[0])]
    result["freshness_by_frontends"] = by_count


def _publish(result: Result, sizes: Sizes, peers: Peers) -> None:
    measures: dict[str, Callable[[], Record]] = {
        name: partial(
            cost.with_peer,
            cost.board_publish if name == "board" else cost.peer_publish,
            start,
            engines=1,
            frontends=1,
            batches=sizes.batches,
        )
        for name, start in peers.starts.items()
        if name in ("board", "flock", "pub_100ms")
    }
    if peers.interpreter is not None:
        measures["vllm"] = partial(_vllm_publish, peers.interpreter, sizes.batches)
    result["publish"] = compare(in_rounds(sizes.rounds, measures), "us")


def _vllm_publish(interpreter: VllmInterpreter, batches: int) -> Record:
    answer = interpreter.ask("publish", calls=50, batches=batches)
    return {"us": float(np.median(answer["ns"])) / 1e3, "cpu_us": float(np.median(answer["cpu_ns"])) / 1e3}


def _decide(result: Result, sizes: Sizes, peers: Peers) -> None:
    by_engines = {n: _decide_among(n, sizes, peers) for n in sizes.engines}
    names = [name for name in by_engines[sizes.engines[0]] if name != "ratios"]
    result["decide"] = {name: {str(n): c[name] for n, c in by_engines.items()} for name in names}
    result["decide"]["ratios"] = {
        name: {str(n): c["ratios"][name] for n, c in by_engines.items()} for name in names if name != "board"
    }


def _decide_among(engines: int, sizes: Sizes, peers: Peers) -> Result:
    batches = max(10, sizes.batches // max(1, engines // 64))
    measures: dict[str, Callable[[], Record]] = {
        "board": partial(cost.in_worker, cost.board_decide, engines, FRONTENDS, batches)
    }
    for name in ("flock", "pub_100ms"):
        measures[name] = partial(cost.with_peer, cost.peer_decide, peers.starts[name], engines, FRONTENDS, batches)
    if peers.interpreter is not None:
        measures["vllm"] = partial(_vllm_decide, peers.interpreter, engines, batches)
    return compare(in_rounds(sizes.rounds, measures), "us")


def _vllm_decide(interpreter: VllmInterpreter, engines: int, batches: int) -> Record:
    ns = interpreter.ask("decide", engines=engines, frontends=FRONTENDS, batches=batches)["ns"]
    return {"us": float(np.median(ns)) / 1e3}


def _route(result: Result, sizes: Sizes, peers: Peers) -> None:
    measures: dict[str, Callable[[], Record]] = {
        "board": partial(cost.in_worker, cost.board_route, ENGINES, FRONTENDS, sizes.batches)
    }
    if peers.interpreter is not None:  # its choice also enters the request in its tables
        measures["vllm"] = partial(_vllm_decide, peers.interpreter, ENGINES, sizes.batches)
    result["route"] = compare(in_rounds(sizes.rounds, measures), "us")


def _cpu(result: Result, sizes: Sizes, peers: Peers) -> None:
    updates = {
        "board": sizes.fast_updates,
        "flock": sizes.fast_updates // 4,
        "vllm": sizes.vllm_updates,
    }
    measures = {
        name: partial(cpu_per_update, start, updates=updates.get(name, sizes.slow_updates))
        for name, start in peers.starts.items()
    }
    rounds = in_rounds(max(1, sizes.rounds // 2), measures)
    result["cpu_per_update"] = compare(rounds, "us")


def _rest(result: Result, sizes: Sizes, peers: Peers) -> None:
    starts = {name: start for name, start in peers.starts.items() if name in ("board", "vllm")}
    rounds: dict[str, list[dict[str, Record]]] = {
        name: [at_rest(start, engines=ENGINES, frontends=FRONTENDS, seconds=sizes.rest_s)]
        for name, start in starts.items()
    }
    result["rss"] = compare({name: [r["rss"] for r in rs] for name, rs in rounds.items()}, "rss_mb")
    result["idle_cpu"] = compare({name: [r["idle_cpu"] for r in rs] for name, rs in rounds.items()}, "percent")
    startup = {"board": peers.board_startup or [board_startup() for _ in range(sizes.rounds)]}
    if peers.vllm_startup:
        startup["vllm"] = peers.vllm_startup
    result["startup"] = compare(startup, "s")


def _wake(result: Result, sizes: Sizes, peers: Peers) -> None:
    measures = _each(peers.wave_starts, wake, engines=ENGINES, trials=sizes.wake_trials)
    rounds = in_rounds(sizes.rounds, measures)
    result["wake"] = compare(rounds, "p50")
    result["wake"]["ratios_p99"] = compare(rounds, "p99")["ratios"]


def _accuracy(result: Result, sizes: Sizes, _: Peers) -> None:
    load: dict[str, Any] = {
        "engines": ENGINES,
        "frontends": FRONTENDS,
        "rate": ACCURACY_RATE,
        "seconds": sizes.accuracy_s,
    }
    measures: dict[str, Callable[[], Record]] = {
        "board": partial(accuracy, board.start, **load),
        "board_without_bookings": partial(accuracy, board.start, bookings=False, **load),
        "pub_10ms": partial(accuracy, pub.start_every(0.01), **load),
        "pub_100ms": partial(accuracy, pub.start, **load),
    }
    result["accuracy"] = compare(in_rounds(sizes.accuracy_rounds, measures), "requests_mean")


SECTIONS: dict[str, Callable[[Result, Sizes, Peers], None]] = {
    "limit": _limit,
    "freshness": _freshness,
    "publish": _publish,
    "decide": _decide,
    "route": _route,
    "cpu_per_update": _cpu,
    "startup, rss, idle_cpu": _rest,
    "wake": _wake,
    "accuracy": _accuracy,
}


class reader_core_apart:
    """While open, new processes keep off the core of the timed front-end."""

    def __enter__(self) -> None:
        leave_reader_core()

    def __exit__(self, *_: object) -> None:
        use_cores(all_cores())


def progress(stream: Any = sys.stderr) -> Callable[[str], None]:
    """Prints a line of progress with the time since the start."""
    began = time.monotonic()

    def say(line: str) -> None:
        stream.write(f"{time.monotonic() - began:6.1f} s  {line}\n")
        stream.flush()

    return say


def flat(result: Result) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(section, peer, record) of every plain section of a result; `decide` comes as ``decide 8``."""
    for section, peers in result.items():
        if section in ("machine", "vllm", "limit", "freshness_by_frontends"):
            continue
        for peer, record in peers.items():
            if peer.startswith("ratios"):
                continue
            if section == "decide":
                for engines, inner in record.items():
                    yield f"decide {engines}", peer, inner
            else:
                yield section, peer, record
