"""``python -m bench gpu-compare``: the board against a broadcast, with lockstep ranks that compute.

The demo with ``--engine torch`` (`dpshm.sim.torch`), a rank a GPU. *stock*: front-ends choose by vLLM's policy
from a broadcast every 100 ms. *default*: they choose from the board by the default policy. Two workloads:

- decode: prompts of 200 tokens at the median, answers of 350;
- prefill: prompts of 2,500 tokens, answers of 16.

Arms play the same requests in turn, and change places from round to round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from math import exp, log
from pathlib import Path
from random import Random
from typing import Any

from bench.vllm.prompts import trace_lines
from bench.vllm.ratios import spread
from dpshm.sim.workloads.agents import BLOCK_TOKENS
from dpshm.sim.workloads.traces import Arrival

ARMS = {"stock": ("--stats", "pub", "--policy", "vllm"), "default": ("--stats", "board")}
WORKLOADS = {"decode": (22.0, 200, 350), "prefill": (14.0, 2_500, 16)}
"""Requests a second for two ranks, median prompt and answer."""
MOST_PROMPT, MOST_OUTPUT = 8_000, 1_000
DEADLINE_S = 300.0


def arrivals(workload: str, seconds: float, ranks: int, seed: int) -> list[Arrival]:
    """Its requests: a Poisson process, log-normal lengths."""
    rate, prompt, output = WORKLOADS[workload]
    random = Random(seed)
    found: list[Arrival] = []
    time_s = 0.0
    while time_s < seconds:
        sizes = (_tokens(random, prompt, 0.8, MOST_PROMPT), _tokens(random, output, 0.6, MOST_OUTPUT))
        found.append(Arrival(time_s, *sizes))
        time_s += random.expovariate(rate * ranks / 2)
    return found


def _tokens(random: Random, median: int, log_deviation: float, most: int) -> int:
    return max(1, min(most, round(exp(random.gauss(log(median), log_deviation)))))


def play(trace: Path, arm: str, options: argparse.Namespace, output_tokens: int) -> dict[str, float]:
    """One arm, once."""
    command = [sys.executable, "-m", "dpshm", "demo", "--engine", "torch", "--engines", str(options.ranks)]
    command += ["--frontends", str(options.frontends), "--seconds", str(options.seconds), "--trace", str(trace)]
    done = subprocess.run([*command, *ARMS[arm], "--json"], capture_output=True, timeout=DEADLINE_S, check=False)
    if done.returncode:
        sys.exit(f"the demo failed: {done.stderr.decode(errors='replace')[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout.decode().strip().splitlines()[-1])
    return {
        "lost": report["sent"] - report["completed"],
        "ttft_mean_ms": report["ttft_ms"]["mean"],
        "ttft_p50_ms": report["ttft_ms"]["p50"],
        "ttft_p99_ms": report["ttft_ms"]["p99"],
        "tokens_per_s": output_tokens / report["seconds"],
        "imbalance": report["imbalance"]["mean"],
    }


def main(argv: list[str]) -> int:
    """Runs what the command line says; gives the exit status."""
    parser = argparse.ArgumentParser("python -m bench gpu-compare", description="The board against a broadcast.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--frontends", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="dpshm-gpu-") as folder:
        for number in range(options.rounds):
            for workload in WORKLOADS:
                requests = arrivals(workload, options.seconds, options.ranks, number)
                trace = Path(folder, f"{workload}-{number}.jsonl")
                trace.write_text("\n".join(trace_lines(requests, BLOCK_TOKENS)) + "\n", encoding="utf-8")
                tokens = sum(a.output_tokens for a in requests)
                for arm in list(ARMS)[:: -1 if number % 2 else 1]:
                    figures = play(trace, arm, options, tokens)
                    results.setdefault((workload, arm), []).append(figures)
                    print(json.dumps({"workload": workload, "round": number, "arm": arm, **figures}), flush=True)
    print(show(results))
    return 0


def show(results: dict[tuple[str, str], list[dict[str, float]]]) -> str:
    """The table: medians over the rounds, least and greatest, and the ratio to stock within a round."""
    lines = ["| workload | figure | stock | default | default / stock |", "|---|---|---|---|---|"]
    for workload in dict.fromkeys(workload for workload, _ in results):
        stock, ours = results[workload, "stock"], results[workload, "default"]
        for figure in ("ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms", "tokens_per_s", "imbalance"):
            pairs = [(a[figure], b[figure]) for a, b in zip(stock, ours, strict=True)]
            cells = [[a for a, _ in pairs], [b for _, b in pairs], [b / a for a, b in pairs if a]]
            lines.append(f"| {workload} | {figure} | " + " | ".join(_cell(values) for values in cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    s = spread(values)
    return "-" if s is None else f"{s.median:.4g} ({s.least:.4g}-{s.greatest:.4g})"
