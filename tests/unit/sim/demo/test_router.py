"""Both ways to decide, on a real board, and the staleness that they note."""

from __future__ import annotations

import msgspec
import pytest
import zmq

from dpshm import Coordinator, Engine
from dpshm.policies import Request, View
from dpshm.policies.columns import ListColumns
from dpshm.sim.demo.broadcast import RankReport
from dpshm.sim.demo.messages import FrontendSettings, broadcast_address, new_prefix
from dpshm.sim.demo.router import BoardRouter, PubRouter, make_router
from tests.support import wait_until


@pytest.fixture
def engines(pair, using):
    """Two engines in this thread, each with one report on the board."""
    engines = [using(Engine.attach(pair, dp_rank=rank)) for rank in range(2)]
    for engine in engines:
        engine.publish(waiting=0, running=0)
    return engines


def make(group: str, stats: str, prefix: str = "ipc://@none"):
    """A router of the first of three front-ends."""
    return make_router(FrontendSettings(1, group, prefix, stats, "least_loaded", 0, 2, 3, []))


def test_board_router_uses_the_newest(pair, engines, using):
    """Guards against a figure above 0 where nothing was published in between."""
    router = using(make(pair, "board"))
    assert isinstance(router, BoardRouter)
    assert router.receive_broadcasts()
    engines[0].publish(waiting=5, running=0)
    routes = [router.route(10) for _ in range(3)]
    assert [route.dp_rank for route in routes] == [1, 1, 1]
    assert router.staleness_us == [0, 0, 0]
    for route in routes:
        router.done(route, 1)


def test_board_router_tells_which_report_was_used(pair, engines, using):
    """Guards against a report that came in during the decision and counts as used, or as missed, by guess."""
    router = using(make(pair, "board"))
    policy, board = router.frontend._decisions._policy, engines[0].board
    old_view = View(ListColumns([0, 1], board.load[:2].tolist(), [0, 0], [0, 0], 1))
    router._before_ns = before_ns = board.beat[:2].tolist()
    engines[1].publish(waiting=3, running=0)  # after the policy's view was made
    policy(old_view, Request(10))
    engines[0].publish(waiting=4, running=0)  # before it was
    policy(View(ListColumns([0, 1], board.load[:2].tolist(), [0, 0], [0, 0], 1)), Request(10))
    late_us = (int(board.beat[1]) - before_ns[1]) / 1e3
    assert router.staleness_us == [late_us, 0]


def test_board_router_follows_a_group_that_is_scaled(group, using):
    """A demo's front-end goes on deciding after `dpshm scale`, in both directions."""
    coordinator = using(Coordinator(group=group, dp_size=2, waves=False))
    engines = [using(Engine.attach(group, dp_rank=rank)) for rank in range(2)]
    for engine in engines:
        engine.publish(waiting=0, running=0)
    router = using(make(group, "board"))
    coordinator.scale(1)
    assert router.route(10).dp_rank == 0
    coordinator.scale(3)
    engines.append(using(Engine.attach(group, dp_rank=2)))
    for rank, engine in enumerate(engines):
        engine.publish(waiting=9 * (rank < 2), running=0)
    wait_until(lambda: engines[2].board.engine_alive(2))
    assert router.route(10).dp_rank == 2
    assert router.staleness_us == [0, 0]


def test_pub_router_uses_its_copy_and_says_how_old_it_is(pair, engines, using):
    """Guards against choices from the board, and against staleness from a clock instead of from reports."""
    prefix = new_prefix()
    context = zmq.Context()
    pub = context.socket(zmq.XPUB)
    pub.bind(broadcast_address(prefix))
    router = using(make(pair, "pub", prefix))
    assert isinstance(router, PubRouter)
    assert not router.receive_broadcasts()  # no broadcast yet
    pub.recv()  # its subscription
    beats = [int(b) for b in engines[0].board.beat[:2]]
    # The copy says that rank 1 is free; the board then says the opposite.
    pub.send(b"\xc1")
    pub.send(msgspec.msgpack.encode([RankReport(r, 2 - 2 * r, 0, 0.0, beats[r]) for r in range(2)]))
    wait_until(router.receive_broadcasts)
    engines[1].publish(waiting=9, running=0)
    route = router.route(10)
    assert route.dp_rank == 1
    assert router.staleness_us == [(int(engines[0].board.beat[1]) - beats[1]) / 1e3]
    wait_until(lambda: engines[0].board.snapshot()["in_flight"].tolist() == [0, 1])  # booked all the same
    # One request of its own counts for as many as there are front-ends.
    assert router.route(10).dp_rank == 0
    router.done(route, 1)
    context.destroy(linger=0)
