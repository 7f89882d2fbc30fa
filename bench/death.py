"""``python -m bench death``: how soon a killed engine is skipped, by its memory, beside the signs of its death.

The kernel frees a process's memory before it drops the process's locks. An engine holds some gigabytes in pages of
4 KiB, and is killed (SIGKILL). This process looks at everything a few thousand times a second. Times are in
milliseconds from just before the signal, each the first time that

- *skipped*: a front-end's decision no longer may choose the engine;
- *lock*: its lock is free. A watch that goes by locks alone, as it was before, cannot skip the engine sooner;
- *flag*: ``PF_EXITING`` is set on each of its threads;
- *thread_pidfd*: the pidfd of one of its threads is readable (Linux 6.9; otherwise that of the process);
- *process_pidfd*: the pidfd of the process is.

All five are taken of the same kill, so the ratio of *lock* to *skipped* is of pairs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import select
import signal
import statistics
import sys
import tempfile
import time
from typing import Any

from bench.baselines.board import stderr_to
from bench.comparison import machine_facts, progress
from bench.faults import LOOK_S, TIMEOUT_S, Observer, Say
from bench.processes import Line, Worker
from dpshm import CoordinatorProcess, Engine
from dpshm.board.board import Board
from dpshm.linux import processes

SIGNS = ("skipped", "lock", "flag", "thread_pidfd", "process_pidfd")


def be_engine(line: Line, group: str, ballast_mb: int) -> None:
    """Rank 0, with memory that it has written to."""
    ballast = mmap.mmap(-1, max(1, ballast_mb) << 20)
    ballast.madvise(mmap.MADV_NOHUGEPAGE)
    if ballast_mb:
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(ballast)), 1, len(ballast))
    with Engine.attach(group, 0) as engine:
        engine.publish(waiting=1, running=0)
        line.ready()
        while not line.told():
            engine.poll(3)
            engine.publish(waiting=1, running=0)


def kill(observer: Observer, board: Board, pid: int) -> dict[str, float]:
    """Kills rank 0's process; returns when each sign showed, in ms.

    Raises:
        TimeoutError: one did not show in time.
    """
    started = processes.start_time(pid)
    pidfds = {
        "thread_pidfd": processes.open_pidfd(pid, started, thread=True),
        "process_pidfd": processes.open_pidfd(pid, started),
    }
    poll = select.poll()
    for fd in pidfds.values():
        assert fd is not None
        poll.register(fd, select.POLLIN)
    shown: dict[str, float] = {}
    began = time.monotonic_ns()
    os.kill(pid, signal.SIGKILL)
    while len(shown) < len(SIGNS):
        readable = {fd for fd, _ in poll.poll(0)}
        seen = {name for name, fd in pidfds.items() if fd in readable}
        if "skipped" not in shown and not observer.may_choose(0):
            seen.add("skipped")
        if "lock" not in shown and not board.engine_alive(0):
            seen.add("lock")
        if "flag" not in shown and processes.life_of(pid, started) is not processes.Life.LIVES:
            seen.add("flag")
        ms = (time.monotonic_ns() - began) / 1e6
        for name in seen:
            shown.setdefault(name, ms)
        if ms > TIMEOUT_S * 1e3:
            raise TimeoutError(f"not seen within {TIMEOUT_S:g} s: {set(SIGNS) - set(shown)}")
        time.sleep(LOOK_S)
    for fd in pidfds.values():
        assert fd is not None
        os.close(fd)
    return shown


def run(sizes_mb: list[int], kills: int, say: Say) -> dict[str, Any]:
    """Measures: by size, what each kill showed."""
    group = f"death-{os.getpid()}"
    found: dict[int, list[dict[str, float]]] = {}
    with tempfile.TemporaryFile() as log, stderr_to(log):
        coordinator = CoordinatorProcess(group=group, dp_size=2, waves=False)
    try:
        with Engine.attach(group, 1) as other, Board.attach(group) as board:
            other.publish(waiting=0, running=0)
            observer = Observer(group)
            for mb in sizes_mb:
                found[mb] = []
                for number in range(kills):
                    say(f"{mb} MB: kill {number + 1} of {kills}")
                    with Worker(be_engine, group, mb) as victim:
                        victim.wait_ready()
                        victim.tell()
                        while not observer.may_choose(0):
                            time.sleep(LOOK_S)
                        time.sleep(0.05 + 0.08 * number / kills)  # not in step with the watch's rounds
                        found[mb].append(kill(observer, board, victim.pid))
            observer.close()
    finally:
        coordinator.close()
    return {"machine": machine_facts(), "ms": found, "load_after": os.getloadavg()[0]}


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m bench death", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--mb", type=int, nargs="+", default=[0, 1024, 4096, 8192], help="memory of the engine")
    parser.add_argument("--kills", type=int, default=5, help="kills for each size (5)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(argv)
    result = run([max(0, mb) for mb in options.mb], max(1, options.kills), progress())
    if options.json:
        json.dump(result, sys.stdout, indent=1)
        print()
        return 0
    print(f"{'ms: median (min to max)':24}" + "".join(f"{name:>26}" for name in SIGNS) + f"{'lock / skipped':>20}")
    for mb, kills in result["ms"].items():
        columns = [[shown[name] for shown in kills] for name in SIGNS]
        cells = [f"{statistics.median(c):.1f} ({min(c):.1f} to {max(c):.1f})" for c in columns]
        ratio = statistics.median(shown["lock"] / shown["skipped"] for shown in kills)
        print(f"{mb:>16} MB     " + "".join(f"{cell:>26}" for cell in cells) + f"{ratio:20.1f}")
    print(f"load afterwards {result['load_after']:.1f}")
    return 0
