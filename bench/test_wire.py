"""The wire: what a message costs to encode and to decode. Counts of all ranks grow with their number."""

from __future__ import annotations

from typing import Any

import pytest

from dpshm.net import wire
from tests.stock_wire import encode_stats

STATS = wire.SchedulerStats(16, 3, 7, 1, 0.4)


@pytest.mark.benchmark(group="wire encode")
def test_encode_report(benchmark: Any) -> None:
    """A stock engine's report."""
    assert benchmark(encode_stats, 3, STATS, timestamp=1.5)


@pytest.mark.benchmark(group="wire decode")
def test_decode_report(benchmark: Any) -> None:
    """The same, in the coordinator."""
    data = encode_stats(3, STATS, timestamp=1.5)
    assert benchmark(wire.decode_engine_message, data).scheduler_stats == STATS


@pytest.mark.benchmark(group="wire encode")
@pytest.mark.parametrize("engines", [1, 8, 64, 256, 1024])
def test_encode_counts(benchmark: Any, engines: int) -> None:
    """What stock front-ends are told."""
    assert benchmark(wire.encode_state, [(3, 16, 0.4)] * engines, 1, True)


@pytest.mark.benchmark(group="wire decode")
@pytest.mark.parametrize("engines", [1, 8, 64, 256, 1024])
def test_decode_counts(benchmark: Any, engines: int) -> None:
    """The same, in a front-end."""
    data = wire.encode_state([(3, 16, 0.4)] * engines, 1, True)
    assert len(benchmark(wire.decode_state, data).counts) == engines


@pytest.mark.benchmark(group="wire encode")
def test_encode_start(benchmark: Any) -> None:
    """START."""
    assert benchmark(wire.encode_start, 7, None)


@pytest.mark.benchmark(group="wire decode")
def test_decode_first_request(benchmark: Any) -> None:
    """A front-end's notice, in the coordinator."""
    data = wire.encode_first_request(3, 7)
    assert benchmark(wire.decode_frontend_message, data) == wire.FirstRequestMessage(3, 7)
