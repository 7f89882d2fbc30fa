"""One arm's server on cores of its own: starts, plays requests, tells what came of them, ends.

Load generators run on the lane's cores too. Arms of a round can play at the same time, each in its lane, and
change lanes from round to round.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.processes import Worker, memory
from bench.vllm import steps
from bench.vllm.player import Answer, play
from bench.vllm.ratios import STOCK
from bench.vllm.scenarios import Deployment
from dpshm.sim.workloads.traces import Arrival
from tests.e2e.vllm.server import NO_MODEL, Server, free_port

KV_BYTES = 1 << 30
"""A million tokens."""
KINDS = {
    "VLLM::Engine": "engine",
    "VLLM::Api": "API server",
    "VLLM::API": "API server",
    "VLLM::DPCoord": "coordinator",
    "dpshm-coord": "coordinator",
}
"""By how the names of its processes begin; Linux keeps 15 letters of them."""
START_S = 0.5
_TICKS = os.sysconf("SC_CLK_TCK")


class Sizes(NamedTuple):
    """How large a server is, and how it is loaded."""

    ranks: int
    api_servers: int
    players: int
    stream_interval: int


class Load(NamedTuple):
    """What is played: the same in all arms of a round.

    Attributes:
        arrivals: in order of time.
        block_tokens: prompt tokens that a block id of them is for.
        seed: of the tokens; no two plays on a server have the same.
    """

    arrivals: list[Arrival]
    block_tokens: int
    seed: str


def environment_of(arm: str) -> dict[str, Any]:
    """What makes a server that arm: stock, default, or a policy's name."""
    if arm == STOCK:
        return {"DPSHM": "0"}
    return {"DPSHM": "1"} | ({} if arm == "default" else {"DPSHM_POLICY": arm})


class Lane:
    """A server of one arm, from its start to `close`.

    Args:
        folder: for its log, its steps and the model's configuration.
        arm: stock, default, or a policy's name.
    """

    def __init__(self, folder: Path, arm: str, deployment: Deployment, sizes: Sizes) -> None:
        self.arm = arm
        self._sizes = sizes
        self._steps = folder / "steps"
        lockstep: dict[str, Any] = (
            {"SLEEPER_LOCKSTEP": f"127.0.0.1:{free_port()}"} if deployment.model == "moe" else {}
        )
        self.server = Server(
            folder,
            deployment.model,
            *("--data-parallel-size", str(sizes.ranks), "--api-server-count", str(sizes.api_servers)),
            *("--stream-interval", str(sizes.stream_interval), "--disable-uvicorn-access-log"),
            *(*deployment.arguments, *NO_MODEL),
            SLEEPER_STEP_MS=deployment.step_ms,
            SLEEPER_KV_BYTES=str(KV_BYTES),
            SLEEPER_LOG=str(self._steps),
            **lockstep,
            **environment_of(arm),
        )

    def move(self, cores: Iterable[int]) -> None:
        """Moves the calling thread, the server and the load generators to these cores."""
        cores = list(cores)
        os.sched_setaffinity(0, cores)
        for pid in self.server.processes():
            with suppress(OSError):
                for task in os.listdir(f"/proc/{pid}/task"):
                    with suppress(OSError):
                        os.sched_setaffinity(int(task), cores)

    def play(self, load: Load) -> dict[str, Any]:
        """Plays it, and gives the figures of the run."""
        shared = list(enumerate(load.arrivals))
        with ExitStack() as stack:
            players = [
                stack.enter_context(
                    Worker(play, self.server.port, load.seed, load.block_tokens, shared[k :: self._sizes.players])
                )
                for k in range(self._sizes.players)
            ]
            for player in players:
                player.wait_ready()
            finished = self.server.metric("vllm:request_success_total")
            cached = self._cached_tokens()
            start_s = time.monotonic() + START_S
            for player in players:
                player.tell(start_s)
            time.sleep(START_S)
            before = self._usage()
            end_s = start_s + max(a.time_s for a in load.arrivals)
            time.sleep(max(0.0, end_s - time.monotonic()))
            after = self._usage()
            results = [_patiently(player) for player in players]
        answers = [Answer(*fields) for found, _ in results for fields in found]
        since = self.server.metric("vllm:request_success_total")
        by_rank = [int(since[r] - finished.get(r, 0.0)) for r in sorted(since)]
        log = self.server.log
        return {
            "arm": self.arm,
            "ranks": self._sizes.ranks,
            "api_servers": self._sizes.api_servers,
            **client_figures(answers),
            "window_s": max(a.ended_s for a in answers) - start_s,
            "cached_tokens": self._cached_tokens() - cached,
            "prompts_share": any(a.block_hashes for a in load.arrivals),
            "by_rank": by_rank,
            "request_imbalance": max(by_rank) / max(1e-9, sum(by_rank) / len(by_rank)),
            **_cpu(before, after, {"load generator": [percent for _, percent in results]}),
            "coordinator_mb": self._coordinator_mb(),
            "dpshm_lines": sum("chooses by the board" in text for text in log.splitlines()),
            "warnings": [t[:200] for t in log.splitlines() if "dpshm" in t and ("WARNING" in t or "ERROR" in t)][
                :5
            ],
            **steps.figures(steps.read(self._steps, self._sizes.ranks), start_s, end_s),
        }

    def _usage(self) -> dict[str, Any]:
        """Seconds of CPU by process, busy and all ticks of the lane's cores, and the time."""
        processes = {}
        for pid, name in self.server.processes().items():
            with suppress(OSError):
                stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
                fields = stat[stat.rindex(")") + 2 :].split()
                processes[pid] = (_kind(name), (int(fields[11]) + int(fields[12])) / _TICKS)
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        busy = total = 0
        for text in Path("/proc/stat").read_text(encoding="ascii").splitlines():
            name, *counts = text.split()
            if name in mine:
                ticks = [int(n) for n in counts[:8]]  # user, nice, system, idle, iowait, irq, softirq, steal
                busy += sum(ticks) - ticks[3] - ticks[4]
                total += sum(ticks)
        return {"processes": processes, "cores": (busy, total), "at": time.monotonic()}

    def _cached_tokens(self) -> float:
        """Prompt tokens that all ranks have found in their prefix caches so far."""
        return sum(self.server.metric("vllm:prefix_cache_hits_total").values())

    def _coordinator_mb(self) -> float:
        pids = [pid for pid, name in self.server.processes().items() if _kind(name) == "coordinator"]
        return sum(memory(pid).rss_mb for pid in pids)

    def close(self) -> None:
        """Ends the server."""
        self.server.stop()


def _kind(name: str) -> str:
    return next((kind for begin, kind in KINDS.items() if name.startswith(begin)), "other")


def _patiently(player: Worker) -> Any:
    """The result of a generator, which says now and then that it is still there."""
    while (result := player.result()) is None:
        pass
    return result


def _cpu(before: dict[str, Any], after: dict[str, Any], percents: dict[str, list[float]]) -> dict[str, Any]:
    """The CPU of the processes by kind, in percent of a core: of all of a kind, and of the busiest."""
    elapsed = after["at"] - before["at"]
    for pid, (kind, seconds) in after["processes"].items():
        if pid in before["processes"]:
            used = seconds - before["processes"][pid][1]
            percents.setdefault(kind, []).append(100 * used / elapsed)
    busy, total = (b - a for a, b in zip(before["cores"], after["cores"], strict=True))
    return {
        "cores_busy_percent": 100 * busy / max(1, total),
        "busiest_percent": {kind: max(values) for kind, values in percents.items()},
        "cpu_percent": {kind: sum(values) for kind, values in percents.items()},
    }


def client_figures(answers: list[Answer]) -> dict[str, Any]:
    """What clients saw: times in ms, of the requests that were answered whole."""
    first = np.array([a.first_s for a in answers if a.first_s is not None]) * 1e3
    total = np.array([a.total_s for a in answers if a.total_s is not None]) * 1e3
    per_token = [
        (a.total_s - a.first_s) * 1e3 / (a.output_tokens - 1)
        for a in answers
        if a.total_s is not None and a.first_s is not None and a.output_tokens > 1
    ]
    p50, p90, p99 = np.percentile(first, (50, 90, 99)) if len(first) else (np.nan,) * 3
    return {
        "requests": len(answers),
        "failed": len(answers) - len(first),
        "said": sorted({a.said for a in answers if a.said})[:3],
        "ttft_mean": float(first.mean()) if len(first) else np.nan,
        "ttft_p50": float(p50),
        "ttft_p90": float(p90),
        "ttft_p99": float(p99),
        "per_token": float(np.mean(per_token)) if per_token else np.nan,
        "total": float(total.mean()) if len(total) else np.nan,
        "sent_late_p99_ms": float(np.percentile([a.late_s for a in answers], 99)) * 1e3,
    }
