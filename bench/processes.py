"""The processes of a measurement: they start clean, get orders from their parent, and end with it.

A `Worker` runs one function in a process of its own, from multiprocessing's fork server: a process with one
thread that has imported the libraries already and no state of the parent. It dies with its parent: the kernel
terminates it when the fork server ends, and the fork server ends when the parent does.

CPU time is read from ``/proc/PID/task/*/schedstat``: nanoseconds that each thread has run, ZMQ's own threads
among them, where ``/proc/PID/stat`` counts in ticks of 10 ms.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
PR_SET_PDEATHSIG = 1  # prctl(2)

_context = get_context("forkserver")
_context.set_forkserver_preload(["dpshm", "msgspec", "numpy", "zmq", "bench.baselines"])


class Told(Exception):
    """Raised by `Line.expect` in a worker whose parent has no more orders."""


class Line:
    """A worker's line to its parent."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def ready(self) -> Any:
        """Says that the preparations are over, and waits until the parent says go; what it then says."""
        self._connection.send(("ready", None))
        return self.expect()

    def expect(self) -> Any:
        """What the parent says next."""
        try:
            return self._connection.recv()
        except EOFError:
            raise Told from None

    def fileno(self) -> int:
        """Readable when the parent has said something; for a poller."""
        return self._connection.fileno()

    def told(self) -> bool:
        """Whether the parent has said something: time to stop. Costs a system call."""
        return self._connection.poll(0)

    def answer(self, value: Any) -> None:
        """Tells the parent something before the function returns."""
        self._connection.send(("value", value))


class WorkerFailed(Exception):
    """What was raised in a worker."""


class Worker:
    """A process that runs ``function(line, *arguments)`` and gives back what that returns."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        ours, theirs = _context.Pipe()
        self._connection = ours
        self._name = function.__name__
        # The fork server keeps the cores that it was started with; the worker takes those of its parent.
        where = (cores(), _all_cores)
        self._process = _context.Process(target=_main, args=(theirs, where, function, arguments), daemon=True)
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def wait_ready(self) -> None:
        """Waits until it is `Line.ready`."""
        kind, _ = self._receive()
        assert kind == "ready", kind

    def tell(self, value: Any = None) -> None:
        """Says something to it: go, or stop."""
        with suppress(BrokenPipeError):  # it has failed, and `result` tells how
            self._connection.send(value)

    def result(self) -> Any:
        """What it answered or returned."""
        return self._receive()[1]

    def _receive(self) -> tuple[str, Any]:
        if not self._connection.poll(TIMEOUT_S):
            raise WorkerFailed(f"{self._name} (pid {self.pid}) said nothing for {TIMEOUT_S:g} s")
        try:
            kind, value = self._connection.recv()
        except EOFError:
            raise WorkerFailed(f"{self._name} (pid {self.pid}) ended without a word") from None
        if kind == "error":
            raise WorkerFailed(f"{self._name} (pid {self.pid}): {value}")
        return kind, value

    def exit_status(self) -> int | None:
        """How it ended, once it has; minus the signal if one ended it."""
        self._process.join(TIMEOUT_S)
        return self._process.exitcode

    def open_doorbell(self) -> None:
        """Has nothing more to say: it is to end. For several workers, before they are waited for in turn."""
        self._connection.close()

    def close(self) -> None:
        """Kills the worker at any point of its work."""
        self.open_doorbell()
        self._process.join(STOP_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.terminate()
        self.close()


def _main(
    connection: Connection,
    where: tuple[list[int], list[int]],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    use_cores(where[0])
    _all_cores[:] = where[1]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Raise an exception, so that the worker removes its files on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    try:
        connection.send(("value", function(Line(connection), *arguments)))
    except (Told, BrokenPipeError, SystemExit):
        return
    except BaseException as e:
        with suppress(BrokenPipeError):
            connection.send(("error", f"{type(e).__name__}: {e}"))


# Where things run.


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


_all_cores = cores()


def all_cores() -> list[int]:
    """The cores that this process had when it began."""
    return _all_cores


def use_cores(wanted: list[int]) -> None:
    """Moves this process, and what it starts from now on, to these cores."""
    os.sched_setaffinity(0, wanted)


def reader_core() -> int | None:
    """The core kept for the one front-end that polls: the last; None where there is but one."""
    return _all_cores[-1] if len(_all_cores) > 1 else None


def leave_reader_core() -> None:
    """Moves this process, and what it starts from now on, to the other cores."""
    if reader_core() is not None:
        use_cores(_all_cores[:-1])


def use_reader_core() -> None:
    """Moves this thread alone to the reader's core; the threads that ZMQ has started stay where they are."""
    core = reader_core()
    if core is not None:
        os.sched_setaffinity(0, [core])


# What they cost.


def cpu_ns(pid: int) -> int:
    """Nanoseconds of CPU that all living threads of a process have used."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # a thread that just ended
            total += int((task / "schedstat").read_text().split()[0])
    return total


class Memory(NamedTuple):
    """Megabytes of 10^6 bytes: resident, and with shared pages split between their users."""

    rss_mb: float
    pss_mb: float


def memory(pid: int) -> Memory:
    """What a process holds, from ``/proc/PID/smaps_rollup``."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        fields[name] = int(value.split()[0]) * 1024 / 1e6
    return Memory(fields["Rss"], fields["Pss"])
