"""Figures: a distribution's quantiles, and the ratio of two peers measured in pairs.

A comparison consists of rounds. Each round measures every peer once, one after the other, so that other load on
the machine affects all of them. A ratio is taken within a round, and reported with its smallest, median and
largest value over the rounds.
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
        raise ValueError("the measurement has no sample: it saw no event")
    p50, p99, p999 = np.quantile(array, (0.5, 0.99, 0.999))
    return {"p50": float(p50), "p99": float(p99), "p99.9": float(p999), "count": len(array)}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest over the rounds."""
    return {"min": float(min(values)), "median": float(np.median(values)), "max": float(max(values))}


def compare(rounds: dict[str, list[dict[str, float]]], key: str) -> dict[str, Any]:
    """The figures of each peer over its rounds, and the ratios of their `key` to the board's.

    Args:
        rounds: by peer, one record of numbers for each round.
        key: the name of the number whose ratios are taken.

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
