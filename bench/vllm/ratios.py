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


def judged(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The runs, each with what it breaks under ``broken``."""
    runs = list(runs)
    stock = {(r["scenario"], r["round"]): r for r in runs if r["arm"] == STOCK}
    return [{**run, "broken": broken(run, stock.get((run["scenario"], run["round"])))} for run in runs]


def arm_figures(runs: Sequence[Run], arm: str, figure: str) -> Spread | None:
    """A figure of one arm, over its rounds that may be believed. Runs are `judged`, of one scenario."""
    return spread([r[figure] for r in runs if r["arm"] == arm and not r["broken"]])


def ratio(runs: Sequence[Run], arm: str, figure: str) -> Spread | None:
    """A figure's ratio to stock, over the rounds in which both may be believed."""
    stock = {r["round"]: r for r in runs if r["arm"] == STOCK and not r["broken"]}
    ours = [r for r in runs if r["arm"] == arm and not r["broken"] and r["round"] in stock]
    return spread([r[figure] / stock[r["round"]][figure] for r in ours])
