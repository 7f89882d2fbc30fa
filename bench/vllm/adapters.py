"""``python -m bench vllm-adapters``: real servers with more adapters than a step has places for, side by side.

An arm is a server: vLLM with its own coordinator, or with the plugin and one policy. All arms get the same
requests at the same time. Engine cores, scheduler and API servers are vLLM's own, the model sleeps
(`bench.sleeping_executor`), and the adapters are names: what counts here is vLLM's rule that a rank runs at most
``--max-loras`` adapters in one step. Given are the total times of the requests, and their ratios to stock's.

Needs the environment of ``tests/e2e/vllm/environment.py``.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.vllm.ratios import STOCK, spread
from tests.e2e.vllm import environment
from tests.e2e.vllm.server import NO_MODEL, Server

PROMPT_TOKENS, OUTPUT_TOKENS = 200, 20
STEP_MS = "20,0.02,0.1,0"
MAX_AT_ONCE = 256
OK = 200
Times = list[float]


def main(argv: list[str]) -> int:
    """Runs what the command line says; gives the exit status."""
    parser = argparse.ArgumentParser("python -m bench vllm-adapters", description=str(__doc__).split("\n\n", 1)[0])
    parser.add_argument("--arms", default="stock,least_work,affinity", help="stock, and policies")
    parser.add_argument("--adapters", type=int, default=6)
    parser.add_argument("--places", type=int, default=2, help="adapters that a rank runs in one step")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=25.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    if reason := environment.why_not():
        print(reason, file=sys.stderr)
        return 2
    environment.install_dpshm(environment.folder())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dpshm-bench-")))
        servers = {}
        for arm in options.arms.split(","):
            servers[arm] = _start(folder / arm, arm, options)
            stack.callback(servers[arm].stop)
        for server in servers.values():
            server.wait_ready()
        rounds = [play(servers, options, number) for number in range(options.rounds)]
    print(table(rounds))
    print(f"load average {os.getloadavg()[0]:.1f}")
    return 0


def _start(folder: Path, arm: str, options: argparse.Namespace) -> Server:
    folder.mkdir()
    settings: dict[str, Any] = {"DPSHM": "0"} if arm == STOCK else {"DPSHM_POLICY": arm, "DPSHM_LOG_S": "0"}
    adapters = [f"adapter-{i}={folder}" for i in range(options.adapters)]
    return Server(
        *(folder, "dense", "--data-parallel-size", str(options.ranks), "--enable-lora"),
        *("--max-loras", str(options.places), "--max-cpu-loras", str(max(options.places, options.adapters))),
        *("--lora-modules", *adapters, *NO_MODEL),
        forked=True,  # there is one API server
        SLEEPER_STEP_MS=STEP_MS,
        **settings,
    )


def play(servers: dict[str, Server], options: argparse.Namespace, seed: int) -> dict[str, Times]:
    """One round; by arm, the total times of the requests in seconds.

    Half of the requests are for any adapter, and half for one with a Pareto distribution.

    Raises:
        RuntimeError: a request was not answered well.
    """
    rng, end = random.Random(seed), time.monotonic() + options.seconds
    with ThreadPoolExecutor(MAX_AT_ONCE) as pool:
        times: dict[str, list[Future[float]]] = {arm: [] for arm in servers}
        while time.monotonic() < end:
            popular = min(options.adapters, int(rng.paretovariate(1.0))) - 1
            adapter = popular if rng.random() < 0.5 else rng.randrange(options.adapters)
            body = {
                "model": f"adapter-{adapter}",
                "token_ids": [rng.randrange(5, 900) for _ in range(PROMPT_TOKENS)],
                "sampling_params": {"max_tokens": OUTPUT_TOKENS, "ignore_eos": True, "detokenize": False},
            }
            for arm, server in servers.items():
                times[arm].append(pool.submit(_ask, server, body))
            time.sleep(rng.expovariate(options.rate))
        return {arm: [answer.result() for answer in of_arm] for arm, of_arm in times.items()}


def _ask(server: Server, body: object) -> float:
    began = time.monotonic()
    status, text = server.request("POST", "/inference/v1/generate", body)
    if status != OK:
        raise RuntimeError(f"status {status}: {text[:300]}")
    return time.monotonic() - began


def table(rounds: list[dict[str, Times]]) -> str:
    """Median of the rounds, and the ratios to stock within a round: median, least, greatest. In Markdown."""
    lines = [
        "| arm | requests | total time, mean | p95 | mean / stock | p95 / stock |",
        "|---|---|---|---|---|---|",
    ]
    for arm in rounds[0]:
        figures = [_figures(times[arm]) for times in rounds]
        cells = [f"{statistics.median(of) * 1e3:.0f} ms" for of in zip(*figures, strict=True)]
        if STOCK in rounds[0]:
            theirs = [_figures(times[STOCK]) for times in rounds]
            for i in range(2):
                of = spread([ours[i] / stock[i] for ours, stock in zip(figures, theirs, strict=True)])
                assert of is not None
                cells.append(f"{of.median:.2f} ({of.least:.2f}-{of.greatest:.2f})")
        lines.append(f"| {arm} | {sum(len(times[arm]) for times in rounds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figures(times: Times) -> tuple[float, float]:
    return statistics.mean(times), sorted(times)[int(len(times) * 0.95)]
