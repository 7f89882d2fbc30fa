"""The report's figures."""

from __future__ import annotations

import msgspec

from dpshm.sim.demo.report import Imbalance, Staleness, Ttft, imbalance_of, staleness_of, ttft_of


def test_figures():
    """Guards against a percentile of the wrong end."""
    values = [float(v) for v in range(101)]
    assert staleness_of(values) == Staleness(p50=50, p99=99, share=round(100 / 101, 4))
    assert ttft_of(values) == Ttft(mean=50, p50=50, p99=99)
    assert imbalance_of([0, 4, 2]) == Imbalance(mean=2, max=4)


def test_figures_of_nothing_are_null():
    """Guards against NaN, which is not JSON, when no request came."""
    assert msgspec.json.encode([staleness_of([]), ttft_of([]), imbalance_of([])]) == (
        b'[{"p50":null,"p99":null,"share":null},{"mean":null,"p50":null,"p99":null},{"mean":null,"max":null}]'
    )
