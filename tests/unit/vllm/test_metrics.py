"""Tests of `dpshm.vllm.metrics`: what vLLM's page shows of the board."""

from __future__ import annotations

import pytest

from dpshm import Coordinator, Engine, Frontend
from dpshm.vllm import metrics

pytest.importorskip("prometheus_client")


@pytest.fixture
def shown(group):
    """The group is on the page of this process."""
    metrics.show(group)
    yield group
    metrics.hide(group)


def value(name, rank):
    """A sample of the page."""
    families = {f.name: f for f in metrics._COLLECTOR.collect()}
    return next(s.value for s in families[name].samples if s.labels["dp_rank"] == str(rank))


def test_each_scrape_reads_the_board(shown, using):
    """Guards against figures of the moment when the server started."""
    with Coordinator(group=shown, dp_size=2):
        frontend = using(Frontend.attach(shown))
        using(Engine.attach(shown, 1))
        assert value("dpshm_rank_in_flight_requests", 1) == 0
        _booked = frontend.route(100, dp_rank=1)
        assert value("dpshm_rank_in_flight_requests", 1) == 1
        assert value("dpshm_rank_prefill_backlog_tokens", 1) == 100


def test_a_board_that_is_gone_does_not_break_the_page(shown):
    """Guards against a scrape that fails for all of vLLM, or hides that the board is gone."""
    samples = [sample for family in metrics._COLLECTOR.collect() for sample in family.samples]
    assert [(s.name, s.labels) for s in samples] == [
        ("dpshm_coordinator_up", {"group": shown}),
        ("dpshm_read_timestamp_seconds", {"group": shown}),
    ]
    assert samples[0].value == 0
    assert list(metrics._COLLECTOR.describe()) == []
