"""Ratios to stock: taken within a round, because all arms of a round play the same requests; median and spread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.vllm.conditions import broken

FIGURES = {
    "ttft_mean": "time to first token, mean, ms",
    "ttft_p50": "p50",
    "ttft_p90": "p90",
    "ttft_p99": "p99",
    "per_token": "time per output token, ms",
    "total": "total time, ms",
}
CPU = {
    "engine_percent": "CPU of all engines, % of a core",
    "engine_step_us": "CPU of an engine a step with requests, us",
    "api_server_percent": "CPU of all API servers, % of a core",
    "coordinator_percent": "CPU of the coordinator, % of a core",
}
"""Measured on /proc/PID/stat while the requests are sent."""
STOCK = "stock"
Run = Mapping[str, Any]


class Spread(NamedTuple):
    """Median, least and greatest over the rounds, and how many they were."""

    median: float
    least: float
    greatest: float
    rounds: int


def spread(values: Sequence[float]) -> Spread | None:
    """Of some values; None of none."""
    if not values:
        return None
    return Spread(float(np.median(values)), min(values), max(values), len(values))


def cpu(run: Run) -> dict[str, float]:
    """The figures `CPU` of a run."""
    of = run["cpu_percent"]
    steps_a_second = run["ranks"] * run["busy_mean"] / (run["step_ms"] / 1e3)
    return {
        "engine_percent": of["engine"],
        "engine_step_us": of["engine"] / 100 / steps_a_second * 1e6,
        "api_server_percent": of["API server"],
        "coordinator_percent": of["coordinator"],
    }


def judged(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The runs, each with its figures of `CPU`, and what it breaks under ``broken``."""
    runs = list(runs)
    stock = {(r["scenario"], r["round"]): r for r in runs if r["arm"] == STOCK}
    return [{**run, **cpu(run), "broken": broken(run, stock.get((run["scenario"], run["round"])))} for run in runs]


def arm_figures(runs: Sequence[Run], arm: str, figure: str) -> Spread | None:
    """A figure of one arm, over its rounds that may be believed. Runs are `judged`, of one scenario.

    None too if a result is older than the figure.
    """
    used = [r for r in runs if r["arm"] == arm and not r["broken"]]
    return spread([r[figure] for r in used]) if all(figure in r for r in used) else None


def ratio(runs: Sequence[Run], arm: str, figure: str) -> Spread | None:
    """A figure's ratio to stock, over the rounds in which both may be believed."""
    stock = {r["round"]: r for r in runs if r["arm"] == STOCK and not r["broken"]}
    ours = [r for r in runs if r["arm"] == arm and not r["broken"] and r["round"] in stock]
    return spread([r[figure] / stock[r["round"]][figure] for r in ours])
