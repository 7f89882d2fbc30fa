"""The built-in chat workload."""

from __future__ import annotations

import itertools
import statistics

import pytest

from dpshm.sim.workloads.chat import MEAN_RATE_PER_S, OUTPUT_MEDIAN, PROMPT_MEDIAN, chat_arrivals


def test_it_has_the_shape_that_it_claims():
    """Guards against figures of a workload that is not the one described."""
    arrivals = chat_arrivals(20_000, seed=3)
    assert len(arrivals) == 20_000
    assert arrivals[0].time_s == 0.0
    assert all(a.time_s <= b.time_s for a, b in itertools.pairwise(arrivals))
    assert len(arrivals) / arrivals[-1].time_s == pytest.approx(MEAN_RATE_PER_S, rel=0.05)
    assert statistics.median(a.prompt_tokens for a in arrivals) == pytest.approx(PROMPT_MEDIAN, rel=0.02)
    assert statistics.median(a.output_tokens for a in arrivals) == pytest.approx(OUTPUT_MEDIAN, rel=0.04)


def test_a_seed_decides():
    """Guards against runs that cannot be repeated, and against seeds that do nothing."""
    assert chat_arrivals(100, 1) == chat_arrivals(100, 1)
    assert chat_arrivals(100, 1) != chat_arrivals(100, 2)
