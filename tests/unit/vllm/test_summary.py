"""Tests of `dpshm.vllm.summary`: the launcher's line about all API servers together."""

from __future__ import annotations

import re

import pytest

from dpshm import Board, Coordinator, Engine, Frontend
from dpshm.ops.watcher import Watcher
from dpshm.vllm import summary
from dpshm.vllm.summary import SummaryLog, line
from tests.support import wait_until


@pytest.fixture
def group_of_two(group, using):
    """Two ranks and two front-ends."""
    using(Coordinator(group=group, dp_size=2, waves=False))
    engines = [using(Engine.attach(group, rank)) for rank in range(2)]
    return engines, [using(Frontend.attach(group)) for _ in range(2)]


def serve_one(engines, frontends):
    """A request of each front-end: one is answered, one runs."""
    routes = [frontend.route(100, dp_rank=rank) for rank, frontend in enumerate(frontends)]
    for engine, route in zip(engines, routes, strict=True):
        engine.receive(route.stamp)
        with engine.step(prefill_tokens=100, batch=1):
            engine.publish(waiting=0, running=1, kv_cache_usage=0.25)
    engines[0].finished(1)
    engines[0].publish(waiting=0, running=0)
    routes[0].first_token()
    routes[0].done(1)


def test_the_line_tells_what_all_front_ends_had(group, using, group_of_two):
    """Guards against a line that counts the requests of one API server alone."""
    with Watcher(Board.attach(group)) as watcher:
        watcher.read()
        assert line(watcher.read()) is None
        serve_one(*group_of_two)
        said = line(watcher.read())
    assert said is not None
    assert "by rank: running 0 1, waiting 0 0, KV cache 0 25 %" in said
    assert re.search(r"time to first token p50 \d+\.\d+ s, p99 \d+\.\d+ s", said)
    assert " 0.0 requests/s" not in said
    assert "cached" not in said  # these engines have no prefix cache


def test_many_ranks_are_summed_up(group, group_of_two, monkeypatch):
    """Guards against a line of a thousand numbers."""
    monkeypatch.setattr(summary, "NAMED_RANKS", 1)
    with Watcher(Board.attach(group)) as watcher:
        watcher.read()
        serve_one(*group_of_two)
        assert "running 0.5 (0 to 1), waiting 0.0 (0 to 0)" in (line(watcher.read()) or "")


def test_a_rank_that_takes_no_requests_is_named(group, group_of_two):
    """Guards against a line that looks well while a rank is out."""
    (_, engine), _ = group_of_two
    with Watcher(Board.attach(group), window_s=3600.0) as watcher:
        watcher.read()
        serve_one(*group_of_two)
        engine.close()
        wait_until(lambda: "; rank 1 is absent" in (line(watcher.read()) or ""))


def test_the_log_ends_with_its_group(group, using, caplog, log):
    """Guards against lines while nothing happens, a thread that outlives its server, and one that cannot end."""
    coordinator = Coordinator(group=group, dp_size=2, waves=False)
    engines = [using(Engine.attach(group, rank)) for rank in range(2)]
    frontends = [using(Frontend.attach(group)) for _ in range(2)]
    logs = SummaryLog(group, 0.01)
    serve_one(engines, frontends)
    wait_until(lambda: log("requests/s") > 0)
    coordinator.close()
    wait_until(lambda: not logs._thread.is_alive())
    logs.close()
    gone = SummaryLog(group, 3600.0)
    wait_until(lambda: not gone._thread.is_alive())
    gone.close()
