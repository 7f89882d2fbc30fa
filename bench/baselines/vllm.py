"""vLLM's own coordinator process, in the interpreter that ``--vllm-python`` names.

`bench.baselines.vllm_peer` starts the coordinator there. The ends are those of `bench.baselines.stock`, which
speak its wire. One coordinator serves all rounds of a run, because each takes seconds to start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench.baselines import Spec, stock

ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # what `vllm serve` sets
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

engine_end, frontend_end = stock.StockEngine, stock.StockFrontend


class VllmError(Exception):
    """An order to vLLM's interpreter failed."""


class VllmInterpreter:
    """The child process that runs in vLLM's interpreter.

    Attributes:
        version: vLLM's version.

    Raises:
        VllmError: there is no vLLM in that interpreter; says why.
    """

    def __init__(self, python: Path) -> None:
        environment = os.environ | ENVIRONMENT
        environment.pop("PYTHONPATH", None)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            # -P: this folder stays off its path, or its `vllm` would be this very file.
            [str(python), "-P", str(Path(__file__).with_name("vllm_peer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            process_group=0,  # Ctrl-C reaches us alone; we end it
            env=environment,
        )
        try:
            self.version = self.ask("version")["version"]
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Runs an order; the functions of `vllm_peer` are the orders."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._said.seek(0)
            said = self._said.read().decode("utf-8", "replace").strip().splitlines()[-1:]
            raise VllmError(f"it ended with exit status {self._process.wait()} when asked to {do}: {said}")
        decoded: dict[str, Any] = json.loads(answer)
        if "error" in decoded:
            raise VllmError(decoded["error"])
        return decoded

    def close(self) -> None:
        """Ends it and its coordinators."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> VllmInterpreter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Vllm:
    """One of its coordinators."""

    def __init__(self, interpreter: VllmInterpreter, dp_size: int, *, waves: bool) -> None:
        self._interpreter = interpreter
        answer = interpreter.ask("coordinator", dp_size=dp_size, waves=waves)
        self.startup_s: float = answer["seconds"]
        self._addresses = stock.Addresses(answer["frontends"], answer["engine_input"], answer["engine_output"])
        self._dp_size = dp_size
        self.pids: list[int] = [answer["pid"]]

    def serve(self, dp_size: int, num_frontends: int) -> Serving:
        """Lends the coordinator to one measurement: a `bench.baselines.Start`."""
        assert dp_size == self._dp_size
        return Serving(Spec("vllm", dp_size, num_frontends, self._addresses), self.pids)

    def close(self) -> None:
        """Ends it."""
        self._interpreter.ask("shutdown", pid=self.pids[0])


class Serving:
    """A coordinator that is lent; `close` leaves it running."""

    def __init__(self, spec: Spec, pids: list[int]) -> None:
        self.spec = spec
        self.pids = pids

    def close(self) -> None:
        """Returns the coordinator without ending it."""
