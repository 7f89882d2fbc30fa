"""A Ray cluster of two machines: ``ray start --head`` on one, ``ray start --address`` on the other, and callers.

A `Caller` is a driver of its own on one of the machines. Ray reports the machine by its address on the cable.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.nodes.machines import Cable, Node, two_nodes
from tests.support import Remote, gone, wait_until

ROOT = Path(__file__).resolve().parents[2]
PORT = 6379
STORE_BYTES = 80_000_000
SHM_MB = 256
PATIENCE_S = 240.0
REPLICAS_A_NODE = 2
SECONDS_TO_FAIL = 60.0
"""A request that was sent has an answer or an error after so long, whatever happens."""
HEALTH = {"RAY_health_check_period_ms": "1000", "RAY_raylet_start_wait_time_s": "240"}
"""Ray calls a machine dead after five failures in a row."""
_DRIVER = """
import ray
from tests.nodes import ray_cluster
ray.init(address=address, _node_ip_address=host, log_to_driver=False)
"""


class Model:
    """A replica: one request at a time, which takes as many milliseconds as it says."""

    def __init__(self) -> None:
        import ray

        from dpshm.ray.replica import register

        self.rank = register(self).dp_rank
        self._host = ray.util.get_node_ip_address()
        self._free = asyncio.Lock()

    async def __call__(self, ms: int) -> tuple[str, int]:
        """Serves a request; the machine and the rank that did."""
        async with self._free:
            await asyncio.sleep(ms / 1000)
        return self._host, self.rank


def size(ms: int) -> int:
    """What the router counts."""
    return ms


def deploy() -> Any:
    """Starts `REPLICAS_A_NODE` replicas on each machine, and gives a handle."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from dpshm.ray.router import BoardRouter

    router = RequestRouterConfig(
        request_router_class=BoardRouter, request_router_kwargs={"cost": "tests.nodes.ray_cluster:size"}
    )
    deployment = serve.deployment(
        num_replicas=2 * REPLICAS_A_NODE,
        max_replicas_per_node=REPLICAS_A_NODE,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1,
        health_check_timeout_s=5,
        request_router_config=router,
    )(Model)
    return serve.run(deployment.bind(), route_prefix=None)


def call(handle: Any, sizes: list[int], timeout_s: float = SECONDS_TO_FAIL) -> list[tuple[str, int]]:
    """What each of some requests got: the machine and the rank, or the name of an error and -1.

    Raises:
        AssertionError: one had neither an answer nor an error after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    got = []
    for response in [handle.remote(ms) for ms in sizes]:
        try:
            got.append(response.result(timeout_s=max(0.0, deadline - time.monotonic())))
        except TimeoutError:
            raise AssertionError(f"a request got no answer and no error within {timeout_s:g} s") from None
        except Exception as e:
            got.append((type(e).__name__, -1))
    return got


class Caller:
    """A driver on one machine, with a handle of the deployment. `handle` is the code that makes it."""

    def __init__(self, using: Callable[[Any], Any], node: Node, host: str, address: str, handle: str) -> None:
        self._process: Remote = using(node.process())
        self.pid = self._process.pid
        self._run(_DRIVER, address=address, host=host)
        self._run(f"from ray import serve\nhandle = {handle}")

    def begin(self, sizes: list[int]) -> None:
        """Sends requests of so many milliseconds; returns at once."""
        self._process.begin(f"got = ray_cluster.call(handle, {sizes})")

    def finish(self) -> list[tuple[str, int]]:
        """What they got."""
        wait_until(self._process.ended, PATIENCE_S)
        got: list[tuple[str, int]] = self._process.eval("got")
        return got

    def call(self, sizes: list[int]) -> list[tuple[str, int]]:
        """`begin` and `finish`."""
        self.begin(sizes)
        return self.finish()

    def _run(self, code: str, **values: Any) -> None:
        self._process.begin(code, **values)
        wait_until(self._process.ended, PATIENCE_S)
        self._process.eval("None")


class Machines:
    """Two machines with Ray on both.

    Args:
        using: closes what it is given, the newest first.
        folder: for logs.
        python: an interpreter that has Ray.
        env: variables for Ray, beside those of this process.
    """

    def __init__(
        self, using: Callable[[Any], Any], folder: Path, python: str = sys.executable, **env: str
    ) -> None:
        self._using, self._folder, self._python, self._env = using, folder, python, env
        self.cable: Cable
        *nodes, self.cable = two_nodes(using, SHM_MB)
        self.nodes: list[Node] = nodes
        self.hosts = self.cable.addresses
        self.address = f"{self.hosts[0]}:{PORT}"
        self.spared: set[int] = set()
        self._start(0, "--head", "--port", str(PORT), "--include-dashboard", "false")
        self._start(1, "--address", self.address)

    def kill(self, node: int) -> None:
        """Everything on a machine dies at once, but `spared`."""
        network = os.stat(f"/proc/{self.nodes[node].pid}/ns/net").st_ino
        ours = {self.nodes[node].pid, *self.spared}
        while pids := [pid for pid in _processes() if pid not in ours and _lives_in(pid, network)]:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def _start(self, node: int, *arguments: str) -> None:
        command = [*self.nodes[node].within, self._python, "-m", "ray.scripts.scripts", "start", "--block"]
        command += ["--node-ip-address", self.hosts[node], "--num-cpus", "4", "--disable-usage-stats"]
        command += ["--object-store-memory", str(STORE_BYTES), *arguments]
        # A machine's own board directory, and not that of the test's process.
        env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY", "DPSHM"))}
        env |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | HEALTH | self._env
        log = self._folder / f"ray-{node}.log"
        with log.open("wb") as out:
            ray = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
        self._using(_Ends(lambda: self._stop(ray, node)))
        wait_until(lambda: ray.poll() is not None or "Ray runtime started" in log.read_text(), PATIENCE_S)
        assert ray.poll() is None, log.read_text()

    def _stop(self, ray: subprocess.Popen[bytes], node: int) -> None:
        ray.terminate()
        try:
            ray.wait(20)
        except subprocess.TimeoutExpired:
            ray.kill()
            ray.wait()
        self.kill(node)


class Cluster(Machines):
    """The machines with the deployment, and a caller on each.

    Args:
        using: closes what it is given, the newest first.
        folder: for logs.
    """

    def __init__(self, using: Callable[[Any], Any], folder: Path) -> None:
        super().__init__(using, folder)
        self._boards: dict[int, Remote] = {}
        handles = "ray_cluster.deploy()", "serve.get_app_handle('default')"
        self.callers = [
            Caller(using, node, host, self.address, handle)
            for node, host, handle in zip(self.nodes, self.hosts, handles, strict=True)
        ]
        self.spared |= {caller.pid for caller in self.callers}

    def groups(self, node: int) -> list[str]:
        """The groups that have a board on a machine."""
        return [json.loads(line)["group"] for line in self.dpshm(node, "ls", "--json").splitlines()]

    def stat(self, node: int) -> dict[str, Any]:
        """What `dpshm stat --json` prints on a machine."""
        told: dict[str, Any] = json.loads(self.dpshm(node, "stat", "--json"))
        return told

    def ranks(self, node: int, name: str) -> list[Any]:
        """A column of the snapshot of a machine's board, by rank."""
        found: list[Any] = self._board(node).eval(f"board.snapshot()[{name!r}].tolist()")
        return found

    def coordinator(self, node: int) -> tuple[int, int]:
        """The process of a machine's board, and its epoch."""
        found: tuple[int, int] = self._board(node).eval("(int(board.coordinator_pid[0]), int(board.epoch[0]))")
        return found

    def _board(self, node: int) -> Remote:
        """A process with a machine's board: quicker than a command."""
        if node not in self._boards:
            (group,) = self.groups(node)
            process = self._boards[node] = self._using(self.nodes[node].process())
            self.spared.add(process.pid)
            process.run(f"board = Board.attach({group!r})")
        return self._boards[node]

    def dpshm(self, node: int, *command: str) -> str:
        """What a command of dpshm prints on a machine."""
        env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "COLUMNS": "150"}
        return self.nodes[node].command(sys.executable, "-m", "dpshm", *command, env=env).stdout


class _Ends:
    """Something to close, that is one call."""

    def __init__(self, end: Callable[[], None]) -> None:
        self.close = end


def _processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _lives_in(pid: int, network: int) -> bool:
    """Whether a process lives in a network namespace."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino == network and not gone(pid)
    except OSError:
        return False
