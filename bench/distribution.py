"""Figures: a distribution's quantiles, and the ratio of two peers measured in pairs.

A comparison is made of rounds. In each, every peer is measured once, one after the other, so that whatever the
machine does beside us falls on all of them; a ratio is taken within a round, and reported with its smallest,
median and largest value over the rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

OURS = "board"


def quantiles(values: Any) -> dict[str, float]:
    """The median, the tail and the count of a sample, in the unit of its values."""
    array = np.asarray(values, dtype=float)
    if not len(array):
        raise ValueError("a distribution of nothing: the measurement saw no event at all")
    p50, p99, p999 = np.quantile(array, (0.5, 0.99, 0.999))
    return {"p50": float(p50), "p99": float(p99), "p99.9": float(p999), "count": len(array)}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest over the rounds."""
    return {"min": float(min(values)), "median": float(np.median(values)), "max": float(max(values))}


def compare(rounds: dict[str, list[dict[str, float]]], key: str) -> dict[str, Any]:
    """What each peer showed in its rounds, and the others' `key` in units of the board's.

    Args:
        rounds: by peer, one record of numbers a round.
        key: the number that the ratios are of.

    Returns:
        By peer a record of medians over the rounds, with all rounds' `key` under ``"rounds"``; under
        ``"ratios"`` by other peer a `spread` of ``other / board`` within each round. Above 1: the board's is
        smaller. No ratio is given where the board's figure is 0.
    """
    result: dict[str, Any] = {}
    for peer, records in rounds.items():
        result[peer] = {name: float(np.median([r[name] for r in records])) for name in records[0]}
        result[peer]["rounds"] = [r[key] for r in records]
    ours = [r[key] for r in rounds[OURS]]
    result["ratios"] = {
        peer: spread([theirs[key] / mine for theirs, mine in zip(records, ours, strict=True)])
        for peer, records in rounds.items()
        if peer != OURS and all(ours)
    }
    return result
