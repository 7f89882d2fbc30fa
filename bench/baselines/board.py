"""dpshm behind the peers' interface. It uses only the public handles."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import zmq

from bench.baselines import Middle, Spec
from dpshm import CoordinatorProcess, Engine, Frontend, Route
from dpshm.board.outstanding import Words
from dpshm.board.words import unpack_load
from dpshm.rules.waves import Phase

_numbers = itertools.count()


class Board:
    """A coordinator process and its board."""

    def __init__(self, dp_size: int, num_frontends: int, *, waves: bool = False) -> None:
        group = f"bench-{os.getpid()}-{next(_numbers)}"
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        began = time.monotonic()
        with stderr_to(self._said):  # its log is none of the report
            self._process = CoordinatorProcess(
                group=group,
                dp_size=dp_size,
                waves=waves,
                max_frontends=max(64, num_frontends),
                # Waves here last some milliseconds. A coordinator that looks ten times a second may find ranks
                # half way each time, and would send START once more for it: not amid a trial.
                resend_interval_ms=60_000,
            )
        self.startup_s = time.monotonic() - began
        self.spec = Spec("board", dp_size, num_frontends, group)
        self.pids = [self._process.proc.pid]

    def close(self) -> None:
        """Ends the coordinator, which removes the board."""
        self._process.close()
        self._said.close()


@contextmanager
def stderr_to(file: IO[bytes]) -> Iterator[None]:
    """Redirects the stderr of a process that is started meanwhile; shows it if the start fails."""
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    except BaseException:
        file.seek(0)
        os.write(kept, file.read())
        raise
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def start(dp_size: int, num_frontends: int) -> Middle:
    """A group without waves."""
    return Board(dp_size, num_frontends)


def start_with_waves(dp_size: int, num_frontends: int) -> Middle:
    """A group with waves."""
    return Board(dp_size, num_frontends, waves=True)


class BoardEngine:
    """An engine's end."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def publish(self, waiting: int, running: int) -> None:
        self._engine.publish(waiting=waiting, running=running)

    def receive(self, frontend: int) -> None:
        """Counts a request of that front-end."""
        self._engine.receive(frontend)

    def wait_ready(self) -> None:
        """Waits until the coordinator is connected to every engine."""
        deadline = time.monotonic() + 30
        while not self._engine.ready:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no READY for engine {self._engine.dp_rank}")
            self._engine.poll(100)

    def register(self, poller: zmq.Poller) -> None:
        self._engine.register(poller)

    def receive_start(self) -> bool:
        return self._engine.poll()

    def accept_request(self, wave: int) -> None:
        self._engine.receive(0, 0, wave)

    def wave_complete(self) -> None:
        self._engine.wave_complete()

    def close(self) -> None:
        self._engine.close()


class BoardFrontend:
    """A front-end's end. Its knowledge is the dense column of loads, which a decision reads."""

    def __init__(self, frontend: Frontend, dp_size: int) -> None:
        self._frontend = frontend
        self.index = frontend.index
        self._load: Words = frontend.board.load[:dp_size]
        self._open: list[deque[Route]] = [deque() for _ in range(dp_size)]
        self._woken_wave = -1
        self._waking: Route | None = None

    def known(self) -> list[int]:
        return self._load.tolist()  # type: ignore[no-any-return]

    def waiting(self, item: Any) -> int:
        return unpack_load(item)[0]

    def wait(self, timeout_ms: int) -> None:
        if timeout_ms:
            time.sleep(timeout_ms / 1e3)

    def sockets(self) -> list[Any]:
        return []

    def beliefs(self) -> tuple[list[int], list[int]]:
        seen = self._frontend.snapshot()
        return (seen["waiting"] + seen["running"]).tolist(), seen["requests"].tolist()

    def choose(self) -> int:
        route = self._frontend.route()
        self._open[route.dp_rank].append(route)
        return route.dp_rank

    def finished(self, dp_rank: int) -> None:
        self._open[dp_rank].popleft().done()

    def first_request(self, send: Callable[[int, int], None]) -> None:
        # The request first: a rank that START wakes before its request comes may be idle again by then, and the
        # request begins a second wave.
        self._waking = route = self._frontend.route(wake=False)
        send(route.dp_rank, route.wave)
        self._frontend.wake()

    def paused(self) -> bool:
        if self._waking is not None:  # that request is answered, after the ranks woke up
            self._woken_wave = self._waking.wave
            self._waking.done()
            self._waking = None
        board = self._frontend.board
        return board.phase is Phase.PAUSED and board.wave > self._woken_wave

    def close(self) -> None:
        del self._load
        self._frontend.close()


def engine_end(spec: Spec, dp_rank: int) -> BoardEngine:
    """Takes a rank's row."""
    return BoardEngine(Engine.attach(spec.where, dp_rank))


def frontend_end(spec: Spec, index: int) -> BoardFrontend:
    """Takes a front-end's row."""
    return BoardFrontend(Frontend.attach(spec.where, owner=f"bench:{index}"), spec.dp_size)
