"""Where front-ends begin among ranks of equal load."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from dpshm import Engine, Frontend
from dpshm.frontend.turns import first_turn
from dpshm.rules.liveness import Verdict
from tests.support import LoneBoard


@pytest.mark.parametrize("count", [*range(1, 41), 64, 100, 1024])
def test_first_turns_are_even(count):
    """Guards against numbers of ranks where many front-ends begin at the same rank."""
    for start in (0, 3, 1000):
        assert sorted(first_turn(start + i, count) for i in range(count)) == list(range(count))


def test_neighbours_begin_apart():
    """Guards against front-ends that send their first requests to the same few ranks."""
    for count in (8, 16, 64):
        first, second = first_turn(0, count), first_turn(1, count)
        assert min((second - first) % count, (first - second) % count) >= count // 4


@pytest.mark.parametrize("count", [5, 6])
def test_short_lived_frontends_spread(group, using, count):
    """Guards against a group of scripts, one after another in the same row, that all send to the same rank."""
    using(LoneBoard(group, engines=count, dp_size=count))
    chosen = Counter()
    for _ in range(4 * count):
        with Frontend.attach(group) as frontend, frontend.route(10) as route:
            chosen[route.dp_rank] += 1
            route.cancel()
    assert chosen == dict.fromkeys(range(count), 4)


@pytest.mark.parametrize("count", [5, 6])
def test_frontends_at_the_same_time_spread(group, using, count):
    """Guards against front-ends that begin at the same rank while no load tells the ranks apart."""
    using(LoneBoard(group, engines=count, frontends=2 * count, dp_size=count))
    chosen = Counter()
    for _ in range(2 * count):
        with using(Frontend.attach(group)).route(10) as route:
            chosen[route.dp_rank] += 1
            route.cancel()
    assert chosen == dict.fromkeys(range(count), 2)


def test_frontends_that_saw_one_rank_first_spread(group, using):
    """Guards against a start among the ranks that is lost when the first of them is there before the others."""
    board = using(LoneBoard(group, engines=5, frontends=10, dp_size=5))
    board.mark(range(1, 5), Verdict.ABSENT)
    frontends = [using(Frontend.attach(group)) for _ in range(10)]
    for frontend in frontends:
        frontend.route(10).cancel()
    board.mark(range(1, 5), Verdict.ALIVE)
    chosen = Counter()
    for frontend in frontends:
        with frontend.route(10) as route:
            chosen[route.dp_rank] += 1
            route.cancel()
    assert chosen == dict.fromkeys(range(5), 2)


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("ahead_s", [1000, -1000])
def test_times_of_another_clock_are_not_used(group, using, count, ahead_s):
    """Guards against a rank in a container with its own clock that gets no requests, or all of them."""
    board = using(LoneBoard(group, engines=count, dp_size=count))
    engines = [using(Engine.attach(group, e)) for e in range(count)]
    frontend = using(Frontend.attach(group, policy="least_work"))
    now_ns = time.monotonic_ns()
    for e, engine in enumerate(engines):
        engine.publish(waiting=0, running=0)
        board.step_model[e] = [now_ns + 3_000_000, 100, 0, 4_000_000, 1000, 1000, 0, 0, 0, 0]
    board.step_model[1, 0] += ahead_s * 10**9
    board.engine_time_namespace[1] += 1
    chosen = Counter()
    for _ in range(10 * count):
        with frontend.route(10) as route:
            chosen[route.dp_rank] += 1
    assert chosen == dict.fromkeys(range(count), 10)


@pytest.mark.parametrize("count", [3, 40])
def test_the_rest_of_a_step_has_a_bound(group, using, count):
    """Guards against one damaged word, or a clock that jumped, that keeps an idle rank out for ever."""
    board = using(LoneBoard(group, engines=count, dp_size=count, waves=False))
    engines = [using(Engine.attach(group, e)) for e in range(count)]
    for engine in engines:
        engine.publish(waiting=0, running=0)
    board.step_model[:, 3:] = [4_000_000, 1_000_000, 1000, 0, 0, 0, 0]
    board.step_model[1, 0] = (1 << 62) - 1
    frontend = using(Frontend.attach(group, policy="least_work"))
    routes = [frontend.route(10) for _ in range(30 * count)]
    assert 2 <= sum(route.dp_rank == 1 for route in routes) < 30


@pytest.mark.parametrize("policy", ["least_loaded", "least_work"])
def test_a_correction_is_as_new_as_the_last_refresh(group, using, policy):
    """Guards against a rank that looks idle for ever, since a message of a row's earlier holder came to it late,
    and the marks have not changed since.
    """
    using(LoneBoard(group, engines=2, dp_size=2))
    engines = [using(Engine.attach(group, e)) for e in range(2)]
    frontend = using(Frontend.attach(group, policy=policy))
    frontend.route(10).cancel()
    for _ in range(3):
        engines[0].receive(frontend.index, 1000)
    engines[0].publish(waiting=3, running=0, prefill_backlog=3000)
    frontend._decisions.next_refresh_ns = 0  # instead of a tenth of a second
    for _ in range(3):
        with frontend.route(10) as route:
            assert route.dp_rank == 1
            route.cancel()
