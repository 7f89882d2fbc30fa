"""The parent's side of the demo's processes: starts them, reads their answers, ends them.

Each child runs a module of this package in a fresh interpreter, gets its orders on stdin and answers in
lines of JSON on stdout (`dpshm.sim.demo.messages`). It is in a process group of its own, so a Ctrl-C reaches
the parent alone, which then ends the children in order. A child whose parent is gone ends by itself
(`dpshm.sim.demo.child`). No signal raises an exception here: the caller's handlers set flags.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import msgspec

from dpshm.sim.demo.messages import EngineReport, FrontendReport, Progress, Ready

STOP_TIMEOUT_S = 3.0
STDERR_KEPT_BYTES = 8000
_READ_BYTES = 1 << 16
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[3])
# -P, and the path at the end: no file of the current folder can replace a module.
_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); from importlib import import_module; "
    "import_module(sys.argv[2]).main()"
)

Answer = Ready | Progress | EngineReport | FrontendReport
_decoder: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


class Child:
    """One process.

    Attributes:
        name: its name in messages.
        told: whether it has its orders.
        ended: whether its output has ended; the process has then ended or is about to.
    """

    def __init__(self, name: str, module: str, pass_fds: tuple[int, ...]) -> None:
        self.name = name
        self.told = False
        self.ended = False
        self._line = b""
        self._stderr = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, _PACKAGE_ROOT, module, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
            process_group=0,
            env=_environment(),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stdin, self.stdout, self.stderr = (
            self._process.stdin,
            self._process.stdout,
            self._process.stderr,
        )

    def tell(self, order: msgspec.Struct) -> None:
        """Sends a line. Does nothing if the child has ended; its answers show the end."""
        self.told = True
        with suppress(BrokenPipeError):
            self._stdin.write(msgspec.json.encode(order) + b"\n")
            self._stdin.flush()

    def read_stdout(self) -> Iterator[Answer]:
        """The answers that have come. Marks the child as ended at the end of its output."""
        data = os.read(self.stdout.fileno(), _READ_BYTES)
        self.ended = not data
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            # Lines that a library prints there are ignored.
            with suppress(msgspec.MsgspecError):
                yield _decoder.decode(line)

    def read_stderr(self) -> bool:
        """Keeps the last part of the child's stderr; returns false at its end."""
        data = os.read(self.stderr.fileno(), _READ_BYTES)
        self._stderr = (self._stderr + data)[-STDERR_KEPT_BYTES:]
        return bool(data)

    @property
    def said(self) -> str:
        """The last part of its stderr."""
        return self._stderr.decode("utf-8", "replace").strip()

    def obituary(self) -> str:
        """How the child ended, and the last line of its stderr."""
        try:
            code = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"{self.name} closed its output and still runs"
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        return f"{self.name} {how}" + (f"; it said: {self.said.splitlines()[-1]}" if self.said else "")

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def signal(self, number: int) -> None:
        """Sends it a signal; does nothing if it has ended."""
        self._process.send_signal(number)

    def terminate(self) -> None:
        """Asks it to end."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        self._process.terminate()

    def kill_and_reap(self) -> None:
        """Kills the child if it has not ended yet, and closes its pipes."""
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):
            self._stdin.close()
        self.stdout.close()
        self.stderr.close()


class Children:
    """The processes of one demo, `all`, in the order of their start. Leaving the context ends each of them."""

    def __init__(self) -> None:
        self.all: list[Child] = []
        self._selector = selectors.DefaultSelector()

    def start(self, name: str, module: str, pass_fds: tuple[int, ...] = ()) -> Child:
        """Starts a child."""
        child = Child(name, module, pass_fds)
        self.all.append(child)
        self._selector.register(child.stdout, selectors.EVENT_READ, (child, True))
        self._selector.register(child.stderr, selectors.EVENT_READ, (child, False))
        return child

    def read(self, timeout_s: float) -> list[tuple[Child, Answer]]:
        """The children's answers. Waits up to `timeout_s` for the first."""
        answers: list[tuple[Child, Answer]] = []
        if not self._selector.get_map():
            time.sleep(timeout_s)
        for key, _ in self._selector.select(timeout_s):
            child, is_stdout = key.data
            if is_stdout:
                answers += [(child, answer) for answer in child.read_stdout()]
                open_ = not child.ended
            else:
                open_ = child.read_stderr()
            if not open_:
                self._selector.unregister(key.fileobj)
        return answers

    def bury(self, child: Child) -> None:
        """Reaps a child that has ended and closes its pipes, so that a long demo does not run out of either."""
        for stream in (child.stdout, child.stderr):
            with suppress(KeyError):
                self._selector.unregister(stream)
        child.kill_and_reap()
        self.all.remove(child)

    def stop(self) -> None:
        """Ends all children with SIGTERM, then the rest with SIGKILL."""
        for child in self.all:
            child.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while not all(child.ended for child in self.all) and time.monotonic() < deadline:
            self.read(0.05)  # a child that writes its report must not find a full pipe
        for child in self.all:
            child.kill_and_reap()
        self.all.clear()
        self._selector.close()

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _environment() -> dict[str, str]:
    """The parent's environment, without the thread pools that numpy would start in every process."""
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
