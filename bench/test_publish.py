"""What an engine does on its own: publish."""

from __future__ import annotations

from typing import Any

import pytest

from bench.baselines import board, engine_end, flock, frontend_end, pub
from dpshm import Engine

PEERS = pytest.mark.parametrize("peer", [board, flock, pub], ids=["board", "flock", "pub_100ms"])


@pytest.mark.benchmark(group="publish")
@pytest.mark.parametrize("engines", [1, 8, 64, 256, 1024])
@PEERS
def test_publish(benchmark: Any, using: Any, peer: Any, engines: int) -> None:
    """A report of one engine among so many; it arrives."""
    middle = using(peer.start(engines, 1))
    end = using(engine_end(middle.spec, 0))
    seen = using(frontend_end(middle.spec, 0))

    def publish() -> None:
        end.publish(3, 16)

    benchmark(publish)
    while seen.waiting(seen.known()[0]) != 3:
        seen.wait(10)


@pytest.mark.benchmark(group="publish")
def test_publish_what_was_received(benchmark: Any, using: Any) -> None:
    """Board: a report with the count of one request received since the last."""
    engine = using(Engine.attach(using(board.start(8, 1)).spec.where, 0))

    def receive() -> None:
        engine.receive(0, 512)

    def publish() -> None:
        engine.publish(waiting=3, running=16, kv_cache_usage=0.4, prefill_backlog=900, step=7)

    benchmark.pedantic(publish, setup=receive, rounds=2000, iterations=1, warmup_rounds=5)
