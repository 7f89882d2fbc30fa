"""``python -m bench vllm``: the real vLLM, with its own coordinator and with dpshm, on the same arrivals.

    python -m bench vllm --trace AzureLLMInferenceTrace_code.csv

Each arm is a whole ``vllm serve`` with several ranks and API servers, fresh for each round; only ``DPSHM``
differs. There is no model: a step sleeps for its modelled duration (`bench.sleeping_executor`), so no GPU is
needed. Arrivals, prompt and output lengths come from a recorded trace, played faster (``--speed``). Arms take
turns within a round and change places from round to round. The figures of each arm are the time to the first
token, the balance of the ranks, and the CPU time of the coordinator's process. Every result is printed.

Needs the environment of ``tests/e2e/vllm/environment.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dpshm.sim.workloads.traces import Arrival, read_trace
from tests.e2e.vllm import environment
from tests.e2e.vllm.server import NO_MODEL, Server

ARMS = {"vLLM": {"DPSHM": "0"}, "dpshm": {"DPSHM": "1"}}
COORDINATORS = ("VLLM::DPCoord", "dpshm-coord")
MAX_MODEL_LEN = 16384
SETTLE_S = 2.0
WARM_UP = [(64, 4)] * 32
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def main(argv: list[str]) -> int:
    """Runs what the command line says; gives the exit status."""
    parser = argparse.ArgumentParser("python -m bench vllm", description=str(__doc__).split("\n\n", maxsplit=1)[0])
    parser.add_argument(
        "--trace", type=Path, required=True, help="arrivals: the Azure CSV or the Mooncake JSON lines"
    )
    parser.add_argument("--speed", type=float, default=5.0, help="play the trace so many times faster")
    parser.add_argument("--skip", type=float, default=0.0, help="seconds of the trace to leave out at its start")
    parser.add_argument("--seconds", type=float, default=90.0, help="how long to play")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--api-servers", type=int, default=4)
    parser.add_argument("--model", choices=("dense", "moe"), default="dense", help="moe: ranks in lockstep")
    parser.add_argument("--policy", default="least_work", help="DPSHM_POLICY of dpshm's arm")
    parser.add_argument("--step-ms", default="15,0.1,0.2", help="of a step: base, per prompt token, per request")
    parser.add_argument("--json", action="store_true", help="print the result for machines, and no table")
    options = parser.parse_args(argv)
    if reason := environment.why_not():
        print(reason, file=sys.stderr)
        return 2
    environment.install_dpshm(environment.folder())
    arrivals, too_long = cut(read_trace(options.trace).arrivals, options)
    result: dict[str, Any] = {
        "trace": options.trace.name,
        "requests": len(arrivals),
        "left_out_as_too_long": too_long,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "cores": os.cpu_count(),
        "rounds": [],
    }
    for number in range(options.rounds):
        order = list(ARMS) if number % 2 == 0 else list(reversed(ARMS))
        figures = {}
        for arm in order:
            print(f"round {number + 1} of {options.rounds}: {arm} ...", file=sys.stderr, flush=True)
            figures[arm] = play(arm, arrivals, options)
            print(f"  {summary(figures[arm])}", file=sys.stderr, flush=True)
        result["rounds"].append({arm: figures[arm] for arm in ARMS})
    if options.json:
        json.dump(result, sys.stdout, indent=1)
        print()
    else:
        show(result)
    return 0


def cut(trace: list[Arrival], options: argparse.Namespace) -> tuple[list[Arrival], int]:
    """The arrivals to play, their times as played; and how many the model's length leaves out."""
    end = options.skip + options.seconds * options.speed
    window = [a for a in trace if options.skip <= a.time_s < end]
    fitting = [a for a in window if a.prompt_tokens + a.output_tokens <= MAX_MODEL_LEN]
    return [a._replace(time_s=(a.time_s - options.skip) / options.speed) for a in fitting], len(window) - len(
        fitting
    )


def play(arm: str, arrivals: list[Arrival], options: argparse.Namespace) -> dict[str, float]:
    """One arm, once: starts its server, plays, gives its figures."""
    with tempfile.TemporaryDirectory(prefix="dpshm-bench-") as folder:
        server = Server(
            Path(folder),
            options.model,
            *("--data-parallel-size", str(options.ranks), "--api-server-count", str(options.api_servers)),
            *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "128", *NO_MODEL),
            SLEEPER_STEP_MS=options.step_ms,
            DPSHM_POLICY=options.policy,
            **ARMS[arm],
        )
        try:
            server.wait_ready()
            server.generate_all(WARM_UP)
            time.sleep(SETTLE_S)
            pid = next(p for p, name in server.processes().items() if name.startswith(COORDINATORS))
            before = server.metric("vllm:request_success_total")
            cpu_before, started = _cpu_s(pid), time.monotonic()
            ttft = asyncio.run(_play(server.port, arrivals))
            elapsed = time.monotonic() - started
            cpu, resident = _cpu_s(pid) - cpu_before, _resident_mb(pid)
            after = server.metric("vllm:request_success_total")
        finally:
            server.stop()
    by_rank = np.array([after[r] - before.get(r, 0.0) for r in sorted(after)])
    seconds = np.array([t for t in ttft if t is not None])
    return {
        "ttft_mean_ms": float(seconds.mean()) * 1e3,
        "ttft_p50_ms": float(np.percentile(seconds, 50)) * 1e3,
        "ttft_p99_ms": float(np.percentile(seconds, 99)) * 1e3,
        "failed": float(len(ttft) - len(seconds)),
        "imbalance": float(by_rank.max() / by_rank.mean()),
        "coordinator_cpu_percent": 100 * cpu / elapsed,
        "coordinator_mb": resident,
    }


async def _play(port: int, arrivals: list[Arrival]) -> list[float | None]:
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 1000) for _ in range(a.prompt_tokens)] for a in arrivals]
    started = time.monotonic()

    async def one(arrival: Arrival, prompt: list[int]) -> float | None:
        await asyncio.sleep(started + arrival.time_s - time.monotonic())
        return await _request(port, prompt, arrival.output_tokens)

    return list(await asyncio.gather(*(one(a, p) for a, p in zip(arrivals, prompts, strict=True))))


async def _request(port: int, prompt: list[int], max_tokens: int) -> float | None:
    """Seconds to the first token of one streamed request; None if it failed."""
    sampling = {"max_tokens": max_tokens, "ignore_eos": True, "detokenize": False}
    body = json.dumps({"token_ids": prompt, "stream": True, "sampling_params": sampling}).encode()
    head = (
        f"POST /inference/v1/generate HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    sent = time.monotonic()
    first: float | None = None
    whole = False
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        async for line in reader:
            if line.startswith(b"data: {") and first is None:
                first = time.monotonic() - sent
            whole = whole or line.startswith(b"data: [DONE]")
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    except OSError:
        return None
    return first if whole else None


def _cpu_s(pid: int) -> float:
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    fields = stat[stat.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE / 1e6


def summary(figures: dict[str, float]) -> str:
    """One arm's figures in a line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


def show(result: dict[str, Any]) -> None:
    """The table: each figure's mean over the rounds, and how far the rounds lay apart."""
    print(f"{result['trace']}: {result['requests']} requests a round, {len(result['rounds'])} rounds,", end=" ")
    options = result["options"]
    print(f"{options['ranks']} ranks, {options['api_servers']} API servers, {result['cores']} cores")
    print(f"{'':26}" + "".join(f"{arm:>24}" for arm in ARMS))
    for name in result["rounds"][0]["vLLM"]:
        cells = []
        for arm in ARMS:
            values = [r[arm][name] for r in result["rounds"]]
            cells.append(f"{sum(values) / len(values):.4g} ({min(values):.4g}-{max(values):.4g})")
        print(f"{name:26}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
