"""A whole server built on dpshm: a coordinator, engines, and uvicorn workers that stream tokens.

    pip install '.[examples]'
    python -m tests.examples.serve --engines 3 --workers 2 --port 8000          # independent ranks (dense)
    python -m tests.examples.serve --engines 3 --workers 2 --port 8000 --lockstep
    curl -N -d '{"prompt_tokens": 512, "max_tokens": 8}' http://127.0.0.1:8000/generate
    dpshm top                                                                   # in another terminal

SIGHUP restarts all of it while it serves, and no request fails. A dense rank is drained, restarted and put back,
one after another. Ranks in lockstep cannot step without one of them, so all are drained, pause together, and are
restarted together; requests that come meanwhile wait in the API servers.

`dpshm scale N` changes the number of ranks while it serves, and no request fails either. Dense ranks are started
or ended (drain those first that go: `dpshm drain 2 && dpshm scale 2`). Ranks in lockstep, which that command
brings to rest, are restarted together as N. SIGTERM and Ctrl-C end the server.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from queue import Empty, SimpleQueue

from dpshm import Coordinator
from dpshm.rules.waves import Phase
from dpshm.sim.demo.lockstep import create_memory

CHECK_S = 0.2
QUIET_S = 0.2
"""How long a drained rank has to stay empty: a front-end may have chosen it just before."""


class Ranks:
    """The engines' processes."""

    def __init__(self, coordinator: Coordinator, *, lockstep: bool) -> None:
        self._coordinator = coordinator
        self._lockstep = lockstep
        self._size = coordinator.board.dp_size
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, ranks: Sequence[int]) -> None:
        """Starts ranks and waits until they are attached. In lockstep all are: they share a new collective."""
        group = self._coordinator.settings.group
        memory = create_memory(self._size) if self._lockstep else -1
        for rank in ranks:
            arguments = [group, *map(str, (rank, self._size, memory))]
            command = [sys.executable, "-m", "tests.examples.engine", *arguments]
            self._processes[rank] = subprocess.Popen(command, pass_fds=[memory] if self._lockstep else [])
        if self._lockstep:
            os.close(memory)
        _wait(lambda: all(map(self._coordinator.board.engine_alive, ranks)))

    def roll(self) -> None:
        """Restarts every rank, with no request at it."""
        everyone = list(range(self._size))
        for ranks in [everyone] if self._lockstep else [[rank] for rank in everyone]:
            for rank in ranks:
                self._coordinator.drain(rank)
            self._wait_until_quiet(ranks)
            self._end(ranks)
            self.start(ranks)
            for rank in ranks:
                self._coordinator.undrain(rank)
            _say(f"restarted ranks {ranks}")

    def follow_size(self) -> None:
        """Does what `dpshm scale` asked for. Ranks in lockstep are at rest and drained then."""
        before, self._size = self._size, self._coordinator.board.dp_size
        if before == self._size:
            return
        self._end(range(before) if self._lockstep else range(self._size, before))
        self.start(range(self._size) if self._lockstep else range(before, self._size))
        if self._lockstep:
            for rank in range(self._size):
                self._coordinator.undrain(rank)
        _say(f"scaled from {before} to {self._size} ranks")

    def revive(self) -> None:
        """Starts again what died. In lockstep the others wait for it in a collective, so all are started again."""
        dead = [rank for rank, process in self._processes.items() if process.poll() is not None]
        if dead:
            _say(f"ranks {dead} died")
            if self._lockstep:
                dead = list(self._processes)
                for rank in dead:
                    self._processes[rank].kill()
                    self._processes[rank].wait()
            self.start(dead)

    def close(self) -> None:
        """Ends all ranks. Those that still run or wait for each other are killed."""
        for process in self._processes.values():
            process.kill()
            process.wait()

    def _wait_until_quiet(self, ranks: Sequence[int]) -> None:
        board = self._coordinator.board
        since = time.monotonic()
        while time.monotonic() < since + QUIET_S:
            awake = self._lockstep and board.phase is not Phase.PAUSED
            if awake or board.snapshot()["requests"][list(ranks)].any():
                since = time.monotonic()
            time.sleep(0.01)

    def _end(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self._processes[rank].terminate()
        for rank in ranks:
            self._processes.pop(rank).wait()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs it until a signal ends it."""
    parser = argparse.ArgumentParser(prog="python -m tests.examples.serve", description=__doc__.partition("\n")[0])
    parser.add_argument("--group", default="example")
    parser.add_argument("--engines", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--lockstep", action="store_true")
    given = parser.parse_args(arguments)
    signals: SimpleQueue[int] = SimpleQueue()
    for each in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda signum, _: signals.put(signum))
    with ExitStack() as stack:
        coordinator = Coordinator(group=given.group, dp_size=given.engines, waves=given.lockstep)
        stack.enter_context(coordinator)
        ranks = Ranks(coordinator, lockstep=given.lockstep)
        stack.callback(ranks.close)
        ranks.start(range(given.engines))
        web = _start_workers(given.group, given.workers, given.port)
        stack.callback(web.wait)
        stack.callback(web.terminate)  # it finishes the requests that it has
        while web.poll() is None:
            try:
                number = signals.get(timeout=CHECK_S)
            except Empty:
                ranks.follow_size()
                ranks.revive()
                continue
            if number != signal.SIGHUP:
                break
            ranks.roll()
            web.send_signal(signal.SIGHUP)  # uvicorn replaces one worker after another
            _say("restarted all ranks; the workers are next")


def _start_workers(group: str, workers: int, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "uvicorn", "tests.examples.api:app", "--port", str(port)]
    # Two at least: with one, uvicorn has no parent process that could replace it.
    command += ["--workers", str(max(2, workers)), "--timeout-worker-healthcheck", "60", "--no-access-log"]
    return subprocess.Popen(command, env={**os.environ, "EXAMPLE_GROUP": group})


def _wait(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def _say(text: str) -> None:
    sys.stdout.write(f"example: {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
