"""What a front-end does on its own: snapshot, decide, the policy alone, the whole of `route`.

On a fixture board (`bench.fixture_board`), by number of engines and of front-ends; beside it the peers' decisions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.baselines import flock, frontend_end, pub
from bench.fixture_board import SITUATIONS, FixtureBoard
from dpshm.policies import NAMES, Request, View, by_name, sees_work

ENGINES = (1, 8, 64, 256, 1024)
FRONTENDS = (1, 4, 16, 64)

pytestmark = pytest.mark.filterwarnings("ignore::pytest_benchmark.logger.PytestBenchmarkWarning")


def _timed(benchmark: Any, fixture: FixtureBoard, call: Callable[[], Any]) -> None:
    """Times it in short rounds, each after a sign of life, so that the front-end does not test locks."""
    benchmark.pedantic(call, setup=fixture.beat, rounds=200, iterations=1, warmup_rounds=5)


@pytest.mark.benchmark(group="decide")
@pytest.mark.parametrize("frontends", FRONTENDS)
@pytest.mark.parametrize("engines", ENGINES)
def test_decide(benchmark: Any, using: Any, engines: int, frontends: int) -> None:
    """Board: read, count every front-end's bookings, choose."""
    fixture = using(FixtureBoard(engines, frontends))
    _timed(benchmark, fixture, lambda: [fixture.frontend.choose(512) for _ in range(20)])
    assert 0 <= fixture.frontend.choose(512) < engines


@pytest.mark.benchmark(group="decide, by what is in flight")
@pytest.mark.parametrize("in_flight", SITUATIONS)
def test_decide_with_requests_in_flight(benchmark: Any, using: Any, in_flight: Any) -> None:
    """Board, 8 engines and 4 front-ends: whether bookings that are in flight cost anything."""
    fixture = using(FixtureBoard(8, 4, in_flight))
    _timed(benchmark, fixture, lambda: [fixture.frontend.choose(512) for _ in range(20)])


@pytest.mark.benchmark(group="decide")
@pytest.mark.parametrize("engines", ENGINES)
@pytest.mark.parametrize("peer", [flock, pub], ids=["flock", "pub_100ms"])
def test_decide_of_peers(benchmark: Any, using: Any, peer: Any, engines: int) -> None:
    """The peers: choose from the slots, or from the copy."""
    end = using(frontend_end(using(peer.start(engines, 4)).spec, 0))

    def decide() -> None:
        for _ in range(20):
            end.finished(end.choose())

    benchmark(decide)


@pytest.mark.benchmark(group="policy alone")
@pytest.mark.parametrize("name", NAMES)
def test_policy(benchmark: Any, using: Any, name: str) -> None:
    """A policy, given what it sees: 8 engines, 4 front-ends."""
    policy = by_name(name)
    seen: list[tuple[View, Request]] = []

    @sees_work
    def watch(view: View, request: Request) -> int:
        seen.append((view, request))
        return policy(view, request)

    fixture = using(FixtureBoard(8, 4, policy=watch))
    fixture.frontend.choose(512, key="conversation")
    view, request = seen[-1]
    chosen = benchmark(policy, view, request)
    assert chosen in view.ranks


@pytest.mark.benchmark(group="route")
@pytest.mark.parametrize("frontends", FRONTENDS)
@pytest.mark.parametrize("engines", ENGINES)
def test_route(benchmark: Any, using: Any, engines: int, frontends: int) -> None:
    """Board: `route` and `done`, in a running group."""
    fixture = using(FixtureBoard(engines, frontends))

    def route_and_finish() -> None:
        for route in [fixture.frontend.route(512) for _ in range(20)]:
            route.done()

    _timed(benchmark, fixture, route_and_finish)


@pytest.mark.benchmark(group="snapshot")
@pytest.mark.parametrize("frontends", FRONTENDS)
@pytest.mark.parametrize("engines", ENGINES)
def test_snapshot(benchmark: Any, using: Any, engines: int, frontends: int) -> None:
    """Board: everything about every rank, as a structured array; for tools."""
    fixture = using(FixtureBoard(engines, frontends))
    benchmark.pedantic(fixture.frontend.snapshot, setup=fixture.beat, rounds=20, iterations=1, warmup_rounds=1)
    assert len(fixture.frontend.snapshot()) == engines
