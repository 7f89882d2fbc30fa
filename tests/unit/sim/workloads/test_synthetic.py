"""The built-in workload."""

from __future__ import annotations

from statistics import mean, median, pvariance

from dpshm.sim.workloads.synthetic import MEAN_RATE_PER_S, synthetic_arrivals


def test_same_seed_same_arrivals():
    """Guards against a run that cannot be repeated."""
    assert synthetic_arrivals(20, 3) == synthetic_arrivals(20, 3)
    assert synthetic_arrivals(20, 3) != synthetic_arrivals(20, 4)


def test_longer_begins_like_shorter():
    """Guards against --seconds changing more than the length."""
    short, long = synthetic_arrivals(10, 1), synthetic_arrivals(30, 1)
    assert long[: len(short)] == short
    assert long[len(short)].time_s >= 10


def test_order_and_ranges():
    """Guards against arrivals out of order or past the end, and requests of no tokens."""
    arrivals = synthetic_arrivals(120, 0)
    times = [a.time_s for a in arrivals]
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] < 120
    assert all(3 <= a.prompt_tokens <= 7437 and 6 <= a.output_tokens <= 1899 for a in arrivals)


def test_shape_is_what_the_module_says():
    """Guards against parameters that drift from those measured on the trace."""
    seconds = 4000
    arrivals = synthetic_arrivals(seconds, 0)
    counts = [0] * seconds
    for a in arrivals:
        counts[int(a.time_s)] += 1
    assert 0.9 < mean(counts) / MEAN_RATE_PER_S < 1.1
    assert 1.8 < (pvariance(counts) - mean(counts)) / mean(counts) ** 2 < 3.2
    assert 1000 < median(a.prompt_tokens for a in arrivals) < 1200
    assert 15 < median(a.output_tokens for a in arrivals) < 18
