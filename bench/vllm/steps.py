"""What the executors logged of their steps: how busy the ranks were, how evenly, and what a step cost beside it.

*Busy* is the share of the time in which a rank was in a step with requests of its own, while requests came.
*Overhead* is the time between two such steps of a rank: what vLLM and the coordinator's hooks do between two
steps. *Between* is the whole time from the end of one step's sleep to the begin of the next one's. In lockstep it
has the wait for the other ranks in it: of all ranks the slowest overhead, and the agreement itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ENTERED, WAITED, SLEPT, REQUESTS, PROMPT, HELD = range(6)
PAUSE_S = 0.05
"""A longer time between two steps is no overhead: there was nothing to do."""
INSTANT_S = 0.05


def read(folder: Path, ranks: int) -> list[NDArray[np.float64]]:
    """The steps of each rank, a row each, as `bench.sleeping_executor` writes them."""
    found = []
    for rank in range(ranks):
        text = (folder / f"rank-{rank}").read_text(encoding="ascii")
        whole = text[: text.rfind("\n") + 1]
        found.append(np.array(whole.split(), dtype=float).reshape(-1, 6))
    return found


def figures(ranks: Sequence[NDArray[np.float64]], start_s: float, end_s: float) -> dict[str, Any]:
    """The figures of the steps that were entered between two times of CLOCK_MONOTONIC.

    Returns:
        ``busy_mean``, ``busy_min``, ``busy_max``; ``overhead_ms``, the median; ``between_ms``, the mean;
        ``step_ms``, the mean length of steps with requests; ``prompt_tokens`` of each rank;
        ``prompt_imbalance``, the greatest of them over the mean; ``held_imbalance``, the greatest number of held
        tokens over the mean, averaged over time.
    """
    within = [r[(r[:, ENTERED] >= start_s) & (r[:, ENTERED] < end_s)] for r in ranks]
    own = [r[r[:, REQUESTS] > 0] for r in within]
    busy = [float((r[:, WAITED] + r[:, SLEPT]).sum()) / (end_s - start_s) for r in own]
    gaps = np.concatenate([_gaps(r, 1) for r in within])
    between = np.concatenate([_gaps(r, 0, waited=True) for r in within])  # in lockstep also of empty steps
    lengths = np.concatenate([r[:, WAITED] + r[:, SLEPT] for r in own])
    prompt = [float(r[:, PROMPT].sum()) for r in within]
    return {
        "busy_mean": float(np.mean(busy)),
        "busy_min": min(busy),
        "busy_max": max(busy),
        "overhead_ms": float(np.median(gaps)) * 1e3 if len(gaps) else 0.0,
        "between_ms": float(np.mean(between)) * 1e3 if len(between) else 0.0,
        "step_ms": float(lengths.mean()) * 1e3 if len(lengths) else 0.0,
        "prompt_tokens": prompt,
        "prompt_imbalance": max(prompt) / (sum(prompt) / len(prompt)) if sum(prompt) else 1.0,
        "held_imbalance": _imbalance(within, start_s, end_s),
    }


def _gaps(steps: NDArray[np.float64], requests: int, *, waited: bool = False) -> NDArray[np.float64]:
    """Between two steps in a row that have so many requests each."""
    ends = steps[:, ENTERED] + steps[:, WAITED] + steps[:, SLEPT]
    gaps: NDArray[np.float64] = steps[1:, ENTERED] - ends[:-1]
    some = (steps[1:, REQUESTS] >= requests) & (steps[:-1, REQUESTS] >= requests) & (gaps < PAUSE_S)
    if waited:
        gaps = gaps + steps[1:, WAITED]
    return gaps[some]


def _imbalance(ranks: Sequence[NDArray[np.float64]], start_s: float, end_s: float) -> float:
    instants = np.arange(start_s, end_s, INSTANT_S)
    held = np.zeros((len(ranks), len(instants)))
    for rank, steps in enumerate(ranks):
        if len(steps):
            at = np.searchsorted(steps[:, ENTERED], instants, side="right") - 1
            held[rank] = np.where(at >= 0, steps[at, HELD], 0.0)
    mean = held.mean(axis=0)
    some = mean > 0
    return float((held.max(axis=0)[some] / mean[some]).mean()) if some.any() else 1.0
