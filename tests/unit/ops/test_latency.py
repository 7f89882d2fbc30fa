"""Tests of `dpshm.ops.latency` and of the window that a watcher gives to it."""

from __future__ import annotations

import numpy as np
import pytest

from dpshm import Board, Coordinator, Engine, Frontend
from dpshm.board.latency import BUCKETS, KINDS, LIMITS_S, TTFT, LatencyWriter, latency_path
from dpshm.ops import watcher as watcher_module
from dpshm.ops.latency import NOTHING, quantile, summary, with_latencies
from dpshm.ops.watcher import Watcher
from tests.unit.ops.frames import make_frame, make_rank


def histogram(counts, sum_s=0.0):
    """A histogram with counts in some buckets."""
    made = np.zeros(BUCKETS + 1, np.int64)
    for bucket, count in counts.items():
        made[bucket] = count
    made[BUCKETS] = round(sum_s * 1e9)
    return made


def test_quantiles_lie_in_the_bucket_that_holds_them():
    """Guards against a p99 that is the median of another bucket, or a bucket's edge for every share."""
    counts = histogram({0: 50, 10: 49, 29: 1}).tolist()[:BUCKETS]
    assert quantile(counts, 0.5) == pytest.approx(0.001)
    assert quantile(counts, 0.25) == pytest.approx(0.0005)
    assert LIMITS_S[9] < quantile(counts, 0.75) < LIMITS_S[10]
    assert quantile(counts, 0.99) == pytest.approx(LIMITS_S[10])
    assert LIMITS_S[28] < quantile(counts, 0.995) < LIMITS_S[29]
    assert quantile(histogram({BUCKETS - 1: 3}).tolist()[:BUCKETS], 0.5) == LIMITS_S[-1]
    assert quantile([0] * BUCKETS, 0.5) is None


def test_a_summary_of_nothing_has_no_figures():
    """Guards against a division by zero, and a latency of 0 s where no request came."""
    assert summary(histogram({})) == NOTHING
    assert summary(histogram({3: 4}, sum_s=0.01)).mean_s == pytest.approx(0.0025)


def test_a_frame_gets_the_figures_of_its_ranks_and_of_all():
    """Guards against figures of another rank, and a rank beyond the histograms that ends a tool."""
    histograms = np.stack([np.stack([histogram({i: e + 1}) for i in range(len(KINDS))]) for e in range(2)])
    frame = with_latencies(make_frame([make_rank(e) for e in range(3)]), histograms, 7.0)
    assert [rank.ttft.count for rank in frame.ranks] == [1, 2, 0]
    assert frame.ttft.count == frame.queue.count == frame.per_token.count == 3
    assert frame.ttft.p50_s < frame.queue.p50_s < frame.per_token.p50_s
    assert frame.latency_over_s == 7.0
    unknown = with_latencies(frame, None, None)
    assert unknown == frame


def test_a_watcher_shows_the_last_minute(group, using, monkeypatch):
    """Guards against figures since the start, in which a new trouble does not show."""
    monkeypatch.setattr(watcher_module, "_LATENCY_LOOK_S", 0.0)
    using(Coordinator(group=group, dp_size=1, waves=False))
    using(Engine.attach(group, 0))
    frontend = using(Frontend.attach(group))
    writer = LatencyWriter(latency_path(frontend.board.segment.sockets_path, frontend.index), 1)
    writer.observe(0, TTFT, 5_000_000_000)
    recent = using(Watcher(Board.attach(group), latency_window_s=0.0))
    whole = using(Watcher(Board.attach(group), latency_window_s=None))
    first = recent.read()
    assert (first.latency_over_s, first.ranks[0].ttft.count) == (None, 1)
    whole.read()
    writer.observe(0, TTFT, 2_000_000)
    assert whole.read().ttft.count == 2
    second = recent.read()
    assert second.ttft.count == 1
    assert second.ttft.p50_s < 0.01
    assert second.latency_over_s > 0
    assert recent.read().ttft == NOTHING
