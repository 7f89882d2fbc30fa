"""Summaries of the histograms of `dpshm.board.latency`: how many requests, their mean, p50 and p99."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from dpshm.board.latency import BUCKETS, KINDS, LIMITS_S
from dpshm.ops.frame import Frame, Latency, Rank

NOTHING = Latency(count=0, mean_s=None, p50_s=None, p99_s=None)


def summary(histogram: NDArray[np.int64]) -> Latency:
    """The summary of one histogram: its counts by bucket, and last its sum in nanoseconds."""
    counts, sum_ns = histogram[:BUCKETS].tolist(), int(histogram[BUCKETS])
    count = sum(counts)
    if not count:
        return NOTHING
    return Latency(
        count=count,
        mean_s=sum_ns / count / 1e9,
        p50_s=quantile(counts, 0.5),
        p99_s=quantile(counts, 0.99),
    )


def quantile(counts: list[int], share: float) -> float | None:
    """The time that a share of the requests did not exceed, in seconds; None without requests.

    Within a bucket it is interpolated, as Prometheus does. Above the last limit it is the last limit.
    """
    wanted, below = share * sum(counts), 0
    if not wanted:
        return None
    for i, limit in enumerate(LIMITS_S):
        if below + counts[i] >= wanted:
            low = LIMITS_S[i - 1] if i else 0.0
            return low + (limit - low) * (wanted - below) / counts[i]
        below += counts[i]
    return LIMITS_S[-1]


def of_rank(histograms: NDArray[np.int64], dp_rank: int) -> dict[str, Latency]:
    """The fields of a rank."""
    if dp_rank >= len(histograms):  # the group grew an instant ago
        return dict.fromkeys(KINDS, NOTHING)
    return {kind: summary(histograms[dp_rank, i]) for i, kind in enumerate(KINDS)}


def with_latencies(frame: Frame, histograms: NDArray[np.int64] | None, over_s: float | None) -> Frame:
    """A frame with the latencies of its ranks and of the group; without histograms they stay null.

    Args:
        frame: the frame.
        histograms: by rank and kind.
        over_s: the length of the window in which they were counted; None: since the group began.
    """
    if histograms is None:
        return frame
    all_ranks = histograms.sum(axis=0)
    return msgspec.structs.replace(
        frame,
        ranks=[_rank(rank, histograms) for rank in frame.ranks],
        latency_over_s=over_s,
        **{kind: summary(all_ranks[i]) for i, kind in enumerate(KINDS)},
    )


def _rank(rank: Rank, histograms: NDArray[np.int64]) -> Rank:
    return msgspec.structs.replace(rank, **of_rank(histograms, rank.dp_rank))
