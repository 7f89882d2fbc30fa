"""Helpers of several test modules: waiting, processes that run orders line by line, the sockets of stock peers.

No helper assumes how fast the machine is: `wait_until` has one generous deadline, so that a test that hangs ends
with a message.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, AnyStr

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from dpshm import Engine
from dpshm.board import files, presence
from dpshm.board.board import Board
from dpshm.board.header import make_header
from dpshm.board.locks import coordinator_byte
from dpshm.board.segment import Segment
from dpshm.board.words import VERDICT_MASK
from dpshm.coordinator.row import CoordinatorRow
from dpshm.coordinator.watch_thread import WatchThread
from dpshm.net import wire
from dpshm.rules.liveness import Verdict
from tests.stock_wire import encode_stats

TIMEOUT_S = 60.0
HEARING_S = 30.0
NOWHERE = "ipc:///nowhere/dpshm"
HOUR_NS = 3_600_000_000_000
_encode = msgspec.msgpack.encode


def wait_until(condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
    """Calls `condition` until its result is true, and returns the result.

    Raises:
        AssertionError: the result was not true within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain"
        time.sleep(0.002)
    return result


def polled(engines: Iterable[Engine]) -> bool:
    """Polls each engine; returns whether all of them run."""
    return all([engine.poll(1) for engine in engines])  # noqa: C419 - each has to look


def count_fds() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def count_threads() -> int:
    """How many threads of dpshm this process has."""
    return sum(thread.name.startswith("dpshm") for thread in threading.enumerate())


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return _state(f"/proc/{pid}/stat") in (b"Z", b"X")
    except OSError:
        return True


def stopped(pid: int) -> bool:
    """Whether every thread of a process is stopped."""
    return all(_state(f"/proc/{pid}/task/{thread}/stat") == b"T" for thread in os.listdir(f"/proc/{pid}/task"))


def _state(path: str) -> bytes:
    with open(path, "rb") as f:
        stat = f.read()
    return stat[stat.rindex(b")") + 2 :].split()[0]


_PATIENCE_NS = presence.COORDINATOR_SILENCE_NS
_lone: list[LoneBoard] = []  # those that are open and count as watched: in whatever order they are closed


class LoneBoard(Board):
    """A board without a coordinator: no process holds that lock, and only the test changes the marks.

    Its addresses lead nowhere: messages of handles wait in their sockets. Front-ends of this process trust
    its marks for an hour, as if a coordinator watched. With `watched` False they test the locks by themselves.
    """

    def __init__(
        self,
        group: str,
        *,
        engines: int = 4,
        frontends: int = 4,
        dp_size: int = 2,
        waves: bool = True,
        watched: bool = True,
        node: int = 0,
        nodes: int = 1,
    ) -> None:
        header = make_header(
            group,
            engines,
            frontends,
            stats_address=NOWHERE,
            engine_input_address=NOWHERE,
            engine_output_address=NOWHERE,
            settings={
                "balancing": "internal",
                "waves": waves,
                "counts_with_kv": True,
                "node": node,
                "nodes": nodes,
            },
        )
        super().__init__(Segment.create(header))
        self.segment.locks.unlock(coordinator_byte(header.columns))
        self.marks = CoordinatorRow(self)
        self.marks.set_dp_size(dp_size)
        if watched:
            _lone.append(self)
            presence.COORDINATOR_SILENCE_NS = HOUR_NS
            self.coordinator_beat[0] = time.monotonic_ns()
            self.mark(range(dp_size), Verdict.ALIVE)

    def mark(self, dp_ranks: Iterable[int], verdict: Verdict) -> None:
        """Gives some engines a verdict."""
        for dp_rank in dp_ranks:
            self.marks.set_engine(dp_rank, verdict=verdict)

    def close(self) -> None:
        """Removes the segment too."""
        if self in _lone:
            _lone.remove(self)
            if not _lone:
                presence.COORDINATOR_SILENCE_NS = _PATIENCE_NS
        if self.segment.usable:
            self.segment.unlink()
        super().close()


class HandWatch(WatchThread):
    """A watch thread whose rounds the test calls, at times of its choosing; the thread runs only to be ended."""

    def __init__(self, board: LoneBoard, stall_timeout_ns: int = 60_000_000_000) -> None:
        super().__init__(board, board.marks, stall_timeout_ns)
        self.board = board
        self.now_ns = time.monotonic_ns()

    def after(self, seconds: float) -> Verdict:
        """A round so much later; the verdict on rank 0."""
        self.now_ns += round(seconds * 1e9)
        self.round(self.now_ns)
        return verdict(self.board, 0)

    def close(self) -> None:
        """Ends it."""
        self.stop()


class Interruption(BaseException):
    """What a signal handler raises."""


def interrupted(call: Callable[[], object], at: int) -> bool:
    """Runs `call`, and raises where a handler could: at the `at`-th entry of a function, or return of a C one.

    Finalizers, and generators that the collector closes, swallow what is raised in them. Such an exception would
    keep the frames of `call`, and with them its Routes, while pytest keeps it to warn: it is dropped here.

    Returns whether there were so many places.
    """
    count = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        if event in ("call", "c_return"):
            count += 1
            if count == at:
                raise Interruption

    before, sys.unraisablehook = sys.unraisablehook, lambda _swallowed: None
    sys.setprofile(profile)
    try:
        call()
    except Interruption:
        pass
    finally:
        sys.setprofile(None)
        sys.unraisablehook = before
    return count >= at


def leftovers(group_prefix: str) -> list[str]:
    """The files of groups of such names in the directory of segments."""
    wanted = files.FILE_PREFIX + group_prefix
    return sorted(name for name in os.listdir(files.directory()) if name.startswith(wanted))


def verdict(board: Board, dp_rank: int) -> Verdict:
    """An engine's verdict, once the next decision of each front-end follows it."""
    found = Verdict(int(board.engine_mark[dp_rank]) & VERDICT_MASK)
    board.wait_for_coordinator(lambda: True)
    return found


def frontend_verdict(board: Board, index: int) -> Verdict:
    """A front-end's verdict, once the next decision of each front-end follows it."""
    found = Verdict(int(board.frontend_mark[index]) & 3)
    board.wait_for_coordinator(lambda: True)
    return found


def outstanding(board: Board) -> NDArray[np.int64]:
    """Outstanding requests and tokens, of shape (2, ranks), signed: a snapshot shows no count below 0."""
    n = board.dp_size
    requests = board.request_offset[:n] + board.received_requests[:n].sum(1)
    return np.stack([requests, board.token_offset[:n] + board.received_tokens[:n].sum(1)])


def in_flight(board: Board) -> NDArray[np.int64]:
    """Requests and tokens that were sent and not received, of shape (2, ranks, front-ends); signed, too."""
    n = board.dp_size
    requests = board.sent_requests[:, :n].T - board.received_requests[:n]
    return np.stack([requests, board.sent_tokens[:, :n].T - board.received_tokens[:n]])


# Processes.


class Marked:
    """The processes that start with a mark in their environment: set `DPSHM_TEST_RUN` to `mark` for them."""

    def __init__(self) -> None:
        self.mark = secrets.token_hex(8)

    def pids(self, part: bytes = b"") -> list[int]:
        """Those that live and have `part` in their command line."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    found += [int(entry.name)] * (part in (entry / "cmdline").read_bytes())
            except OSError:
                continue
        return found

    def workers(self) -> list[int]:
        """Those of a pool."""
        return self.pids(b"spawn_main")


class RemoteError(Exception):
    """What was raised in a `Remote`: its type's name and its message."""


class Popen(subprocess.Popen[AnyStr]):
    """A command that does not outlive the block of a test that fails: nobody would tell it to end."""

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        """Waits for it, and kills it first if the block raised."""
        if kind is not None:
            self.kill()
        super().__exit__(kind, *rest)


class Remote:
    """A process that runs the code it is told, in one thread and one namespace, until it is closed or killed.

    The namespace has all of dpshm, `os`, `time`, and `told()`: whether there is something new to do, which ends
    the loops given to `begin`. It comes from multiprocessing's fork server, a clean process with one thread that
    has imported all this already. A `Remote` whose parent dies ends by itself.
    """

    def __init__(self) -> None:
        ours, theirs = _context.Pipe()
        self._connection = ours
        self._begun = False
        self._process = _context.Process(target=_remote_main, args=(theirs, dict(os.environ)), daemon=True)
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def run(self, code: str, **values: Any) -> None:
        """Runs statements there; `values` become names first."""
        self._ask("exec", code, values)

    def eval(self, code: str, **values: Any) -> Any:
        """The value of an expression there."""
        return self._ask("eval", code, values)

    def begin(self, code: str, **values: Any) -> None:
        """Begins statements there and returns at once; they end when `told()`, that is at the next call here."""
        self._settle()
        self._connection.send(("exec", code, values))
        self._begun = True

    def ended(self) -> bool:
        """Whether what was begun there has ended by itself, or the process has; the next call here tells how."""
        return self._connection.poll(0)

    def signal(self, number: int) -> None:
        """Sends it a signal; returns once a SIGSTOP has stopped its last thread, which takes a moment."""
        os.kill(self.pid, number)
        if number == signal.SIGSTOP:
            wait_until(lambda: stopped(self.pid))

    def kill(self) -> None:
        """SIGKILL; returns once it is gone."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: gone(self.pid))
        self._process.join()

    def close(self) -> None:
        """Ends the process, also in the middle of an order."""
        self._connection.close()
        if self._process.is_alive():
            self.kill()
        self._process.join()
        self._process.close()

    def _ask(self, kind: str, code: str, values: dict[str, Any]) -> Any:
        self._settle()
        self._connection.send((kind, code, values))
        return self._answer()

    def _settle(self) -> None:
        if self._begun:
            self._begun = False
            self._connection.send(("eval", "None", {}))
            self._answer()
            self._answer()

    def _answer(self) -> Any:
        assert self._connection.poll(TIMEOUT_S), f"process {self.pid} did not answer"
        try:
            fine, value = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RemoteError(f"it ended with exit status {self._process.exitcode}") from None
        if not fine:
            raise RemoteError(value)
        return value


def _remote_main(connection: Connection, environment: dict[str, str]) -> None:
    # The fork server has the environment that the run began with.
    os.environ.clear()
    os.environ.update(environment)
    names: dict[str, Any] = {"told": lambda: connection.poll(0)}
    exec("import os, time, signal, threading\nfrom dpshm import *", names)
    while True:
        try:
            kind, code, values = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        names.update(values)
        try:
            value = None
            if kind == "eval":
                value = eval(code, names)
            else:
                exec(code, names)
            connection.send((True, value))
        except Exception as e:
            connection.send((False, f"{type(e).__name__}: {e}"))


_context = get_context("forkserver")
_context.set_forkserver_preload(["dpshm", "msgspec", "zmq"])

LOOP = """
while not told():
    {0}.poll(1)
    {0}.publish(waiting={1}, running={2})
"""


def publish_forever(remote: Remote, waiting: int = 0, running: int = 0) -> None:
    """Has a `Remote`'s `engine` poll and publish until it is told something else."""
    remote.begin(LOOP.format("engine", waiting, running))


# Stock peers: plain sockets, as vLLM's engines and front-ends have them.


class StockEngine:
    """The sockets of a vLLM engine: XSUB for READY and START, PUSH for its reports."""

    def __init__(self, addresses: tuple[str, str], dp_rank: int) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self.dp_rank = dp_rank
        self.input = context.socket(zmq.XSUB)
        self.output = context.socket(zmq.PUSH)
        for s, address in zip((self.input, self.output), addresses, strict=True):
            s.setsockopt(zmq.LINGER, 0)
            s.connect(address)
        self.input.send(wire.SUBSCRIBE)

    def heard(self, timeout_s: float = HEARING_S) -> list[bytes]:
        """The next message from the coordinator, frame by frame; none in time is a failure."""
        assert self.input.poll(round(timeout_s * 1000)), f"engine {self.dp_rank} heard nothing"
        return self.input.recv_multipart()

    def send(self, data: bytes) -> None:
        """Sends an encoded report."""
        self.output.send(data)

    def report(self, waiting: int, running: int, kv: float = 0.0, *, step: int = 0, wave: int = 0) -> None:
        """Sends its queues, as vLLM encodes them."""
        stats = wire.SchedulerStats(running, waiting, step, wave, kv)
        self.send(encode_stats(self.dp_rank, stats, timestamp=1.5))

    def close(self) -> None:
        """Leaves."""
        self.input.close()
        self.output.close()


class StockFrontend:
    """The socket of a vLLM front-end: an XSUB that hears counts and states and speaks upstream."""

    def __init__(self, address: str) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.XSUB)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)
        self.socket.send(wire.SUBSCRIBE)

    def send(self, data: bytes) -> None:
        """Sends a message upstream."""
        self.socket.send(data)

    def heard(self, timeout_s: float = HEARING_S) -> bytes:
        """The next publication; none in time is a failure."""
        assert self.socket.poll(round(timeout_s * 1000)), "the front-end heard nothing"
        return self.socket.recv()

    def heard_state(self) -> wire.StateMessage:
        """The next publication, decoded."""
        return wire.decode_state(self.heard())

    def wait_for(self, condition: Callable[[wire.StateMessage], Any]) -> wire.StateMessage:
        """The first publication from now on that fulfils `condition`."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition(state := self.heard_state()):
            assert time.monotonic() < deadline, f"last heard {state}"
        return state

    def is_silent(self, for_s: float) -> bool:
        """Whether nothing is published for a while."""
        return not self.socket.poll(round(for_s * 1000))

    def close(self) -> None:
        """Leaves."""
        self.socket.close()


def numbers(state: wire.StateMessage) -> list[tuple[int, int, float]] | None:
    """The counts of a publication as plain tuples."""
    if state.counts is None:
        return None
    return [(c.waiting, c.running, c.kv_cache_usage) for c in state.counts]
