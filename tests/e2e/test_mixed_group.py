"""Groups of which only some processes use dpshm: stock engines and front-ends beside ours."""

from __future__ import annotations

import os
import signal
from collections import Counter

import pytest

from dpshm import Coordinator, Engine, Frontend, NoEngineAvailable, SettingError, StartupTimeout
from dpshm.board.words import ON_BEHALF
from dpshm.coordinator import sent_log
from dpshm.net import wire
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import Phase
from tests.support import (
    HOUR_NS,
    Remote,
    StockEngine,
    StockFrontend,
    numbers,
    polled,
    publish_forever,
    verdict,
    wait_until,
)


def mixed(group, using, **settings):
    """A coordinator of four ranks, two of ours (0, 1) and two stock ones (2, 3)."""
    coordinator = using(Coordinator(group=group, dp_size=4, stats_interval_ms=5, **settings))
    ours = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    stock = [using(StockEngine(coordinator.engine_addresses, dp_rank)) for dp_rank in (2, 3)]
    for engine in stock:
        assert engine.heard() == [wire.READY]
    for engine in ours:
        wait_until(lambda engine=engine: engine.poll(10) or engine.ready)
    for engine in stock:
        engine.report(0, 0)
    wait_until(lambda: [verdict(coordinator.board, e) for e in range(4)] == [Verdict.ALIVE] * 4)
    return coordinator, ours, stock


@pytest.fixture
def in_flight(monkeypatch):
    """Bookings at stock engines stay in flight until this is called: a busy machine may take 0.1 s at once."""
    with monkeypatch.context() as patch:
        patch.setattr(sent_log, "IN_FLIGHT_NS", HOUR_NS)
        yield patch.undo


def test_our_frontends_route_to_all(group, using, in_flight):
    """Guards against stock engines that are never chosen, or always, because their row looks different."""
    coordinator, ours, stock = mixed(group, using)
    assert coordinator.board.snapshot()["stock"].tolist() == [False, False, True, True]
    frontends = [using(Frontend.attach(group, owner=str(i))) for i in range(2)]
    routes = [frontends[i % 2].route(10) for i in range(20)]
    assert Counter(route.dp_rank for route in routes) == dict.fromkeys(range(4), 5)
    # dpshm's engines count their requests; requests of stock engines are known by their reports alone.
    for engine in ours:
        for f in range(2):
            for _ in range(int(coordinator.board.sent_requests[f, engine.dp_rank])):
                engine.receive(f, 10)
        engine.publish(waiting=0, running=5)
    stock[0].report(0, 5)
    stock[1].report(1, 9)
    in_flight()
    wait_until(lambda: coordinator.board.snapshot()["requests"].tolist() == [5, 5, 5, 10])
    wait_until(
        lambda: coordinator.board.snapshot()["in_flight"].tolist() == [0, 0, 0, 0]
    )  # stored after the offset
    more = [frontends[i % 2].route(10) for i in range(15)]
    assert Counter(route.dp_rank for route in more) == {0: 5, 1: 5, 2: 5}


def test_bookings_at_stock_engines_heal(group, using, in_flight, monkeypatch):
    """Guards against requests that finished on a stock engine and still count as in flight."""
    coordinator, _, stock = mixed(group, using)
    frontend = using(Frontend.attach(group))
    routes = [frontend.route(10, dp_rank=2) for _ in range(4)]
    assert frontend.snapshot()[2]["in_flight"] == 4
    in_flight()
    stock[0].report(4, 0)
    wait_until(lambda: frontend.snapshot()[2]["in_flight"] == 0)
    assert frontend.snapshot()[2]["requests"] == 4
    for route in routes:
        route.done()
    stock[0].report(0, 0)
    wait_until(lambda: frontend.snapshot()[2]["requests"] == 0)
    monkeypatch.setattr(sent_log, "IN_FLIGHT_NS", HOUR_NS)
    _booked = frontend.route(10, dp_rank=2)
    assert (frontend.snapshot()[2]["in_flight"], frontend.snapshot()[2]["in_flight_tokens"]) == (1, 10)
    assert coordinator.dropped == {}


def test_waves_include_everybody(group, using):
    """Guards against a wave in which only one kind of engine takes part."""
    coordinator, ours, stock = mixed(group, using)
    stock_frontend = using(StockFrontend(coordinator.stats_publish_address))

    def everybody_runs(wave, exclude):
        for engine in stock:
            assert start_heard(engine, wave) == wire.StartMessage(wave, exclude)
        wait_until(lambda: polled(ours))
        wait_until(lambda: (coordinator.board.wave, coordinator.board.phase) == (wave, Phase.RUNNING))
        assert stock_frontend.wait_for(lambda state: state.running).wave == wave

    def everybody_pauses(wave):
        for engine in ours:
            engine.wave_complete()
        assert stock_frontend.wait_for(lambda state: not state.running).wave == wave + 1

    stock_frontend.send(wire.encode_first_request(3, 0))
    everybody_runs(0, None)
    everybody_pauses(0)
    using(Frontend.attach(group)).route(dp_rank=2)
    everybody_runs(1, None)
    everybody_pauses(1)
    stock[1].send(wire.encode_wave_started(3, 2))
    everybody_runs(2, 3)
    everybody_pauses(2)
    ours[1].receive(None, wave=3)
    everybody_runs(3, 1)


def test_stock_frontends_see_both_kinds(group, using):
    """Guards against stock front-ends that see only engines which report over ZMQ."""
    coordinator, ours, stock = mixed(group, using)
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    ours[1].publish(waiting=1, running=2, kv_cache_usage=1.0)
    stock[0].report(3, 4, 0.3)
    expected = [(0, 0, 0.0), (1, 2, 1.0), (3, 4, 0.3), (0, 0, 0.0)]
    frontend.wait_for(lambda state: numbers(state) == expected)


def test_an_engine_that_changes_sides(group, using):
    """Guards against a rolling upgrade that needs the whole group to stop, in either direction."""
    coordinator, ours, stock = mixed(group, using)
    stock[1].report(7, 7)
    wait_until(lambda: coordinator.board.snapshot()[3]["requests"] == 14)
    coordinator._wave.mailbox.call(lambda: None)  # the thread that stores the report has stored all of it
    stock[1].close()
    upgraded = using(Engine.attach(group, 3))
    row = coordinator.board.snapshot()[3]
    assert (row["stock"], row["requests"], row["verdict"]) == (False, 0, "alive")
    upgraded.publish(waiting=0, running=1)
    ours[0].close()
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.ABSENT)
    downgraded = using(StockEngine(coordinator.engine_addresses, 0))
    downgraded.report(0, 2)
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.ALIVE)
    row = coordinator.board.snapshot()[0]
    assert (row["stock"], row["requests"]) == (True, 2)
    # Rank 2 was left out, too, if a tenth of a second went by between the old rank 3 and the new one.
    stock[0].report(0, 0, step=1)
    wait_until(lambda: verdict(coordinator.board, 2) is Verdict.ALIVE)
    frontend = using(Frontend.attach(group))
    routes = [frontend.route() for _ in range(16)]
    assert {route.dp_rank for route in routes} == {0, 1, 2, 3}


def test_our_engines_die_and_stock_ones_stay(group, using):
    """Guards against verdicts of one kind of engine that reach the other."""
    coordinator = using(Coordinator(group=group, dp_size=2))
    remote = using(Remote())
    remote.run("engine = Engine.attach(group, 0)", group=group)
    stock = using(StockEngine(coordinator.engine_addresses, 1))
    assert stock.heard() == [wire.READY]
    stock.report(0, 9)
    publish_forever(remote)
    frontend = using(Frontend.attach(group))
    wait_until(lambda: coordinator.board.snapshot()["requests"].tolist() == [0, 9])
    assert frontend.route().dp_rank == 0
    remote.kill()
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.DEAD)
    assert {frontend.route().dp_rank for _ in range(6)} == {1}


def test_stock_engines_survive_a_coordinator(group, using):
    """Guards against stock engines that are never chosen again after the coordinator was replaced."""
    first = using(Remote())
    first.run("coordinator = Coordinator(group=group, dp_size=2)", group=group)
    addresses = first.eval("coordinator.engine_addresses")
    ours = using(Engine.attach(group, 0))
    stock = using(StockEngine(addresses, 1))
    assert stock.heard() == [wire.READY]
    stock.report(0, 3)
    wait_until(lambda: ours.board.snapshot()["stock"].tolist() == [False, True])
    frontend = using(Frontend.attach(group))
    first.kill()
    ours.publish(waiting=0, running=9)
    assert {frontend.route().dp_rank for _ in range(4)} == {1}
    second = using(Coordinator(group=group, dp_size=2))
    assert second.engine_addresses == addresses
    stock.report(0, 20)
    wait_until(lambda: second.board.snapshot()[1]["running"] == 20)
    second._wave.mailbox.call(lambda: None)  # the thread that stores the report has stored all of it
    assert {frontend.route().dp_rank for _ in range(4)} == {0}
    assert stock.heard()[0] in (wire.READY, wire.START_FRAME)


class Worker:
    """A process that outlives the one that forked it."""

    def __init__(self, pid):
        self.pid = pid

    def close(self):
        """Ends it."""
        os.kill(self.pid, signal.SIGKILL)


def test_a_rank_that_never_came_is_not_there(group, using):
    """Guards against the connection that a forked worker keeps, taken for a stock engine that no process is."""
    coordinator = using(Coordinator(group=group, dp_size=2))
    frontend = using(Frontend.attach(group))
    for _ in range(2):
        engine = using(Remote())
        engine.run("engine = Engine.attach(group, 0)", group=group)
        using(Worker(engine.eval("os.fork() or (time.sleep(60), os._exit(0))")))
        wait_until(lambda: verdict(coordinator.board, 0) is Verdict.ALIVE)
        engine.kill()
        wait_until(lambda: verdict(coordinator.board, 0) is Verdict.DEAD)
    again = using(Engine.attach(group, 0))
    with pytest.raises(StartupTimeout, match=r"\[1\]"):
        coordinator.wait_ready(0.3)
    assert not again.poll()
    assert not again.ready
    assert {frontend.route(wake=False).dp_rank for _ in range(6)} == {0}
    assert coordinator.board.snapshot()["state"].tolist() == ["idle", "absent"]


def test_connections_alone_make_no_stock_engine(group, using):
    """Guards against requests to a rank of which nothing but a connection was seen."""
    coordinator = using(Coordinator(group=group, dp_size=2))
    stock = [using(StockEngine(coordinator.engine_addresses, e)) for e in range(2)]
    for engine in stock:
        assert engine.heard() == [wire.READY]
    frontend = using(Frontend.attach(group))
    with pytest.raises(NoEngineAvailable):
        frontend.route()
    stock[1].report(0, 0)
    wait_until(lambda: verdict(coordinator.board, 1) is Verdict.ALIVE)
    assert {frontend.route().dp_rank for _ in range(4)} == {1}


def test_a_front_end_proves_a_stock_engine_that_had_no_request_yet(group, using):
    """Guards against a dense group of stock engines whose first request waits for a report, and that for it."""
    coordinator = using(Coordinator(group=group, dp_size=3, waves=False))
    frontend = using(Frontend.attach(group))
    stock = [using(StockEngine(coordinator.engine_addresses, e)) for e in range(2)]
    for e in range(2):
        frontend.heard_from(e)  # perhaps before the coordinator knows of its connection
    wait_until(lambda: _route_or_none(frontend) is not None)
    # A front-end says it again when it is called: of either rank it may have been too early.
    wait_until(
        lambda: (
            _route_or_none(frontend) is not None
            and [verdict(coordinator.board, e) for e in range(2)] == [Verdict.ALIVE] * 2
        )
    )
    routes = [frontend.route() for _ in range(8)]
    assert {route.dp_rank for route in routes} == {0, 1}
    assert verdict(coordinator.board, 2) is Verdict.ABSENT  # no front-end has heard of it
    stock[0].report(0, 1)
    wait_until(lambda: coordinator.board.snapshot()["running"].tolist() == [1, 0, 0])
    for route in routes:
        route.done()

    stock[1].close()  # it is not known which one left
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.ABSENT)
    before = coordinator.board.messages_received[0]
    frontend.heard_from(0)
    frontend.heard_from(1)  # a word that is too old: one connection, two ranks
    wait_until(lambda: coordinator.board.messages_received[0] >= before + 2)
    assert verdict(coordinator.board, 1) is Verdict.ABSENT
    frontend.heard_from(1, connected=False)
    wait_until(lambda: _route_or_none(frontend) == 0)
    assert verdict(coordinator.board, 1) is Verdict.ABSENT


def test_a_front_ends_word_makes_no_rank_of_which_there_is_no_connection(group, using):
    """Guards against a rank that never came, and that a front-end takes for another one's left-over connection."""
    coordinator = using(Coordinator(group=group, dp_size=2, waves=False))
    frontend = using(Frontend.attach(group))
    engine = using(Engine.attach(group, 0))
    before = coordinator.board.messages_received[0]
    frontend.heard_from(0)  # of a rank that is there, nothing is said
    frontend.heard_from(1)
    wait_until(lambda: coordinator.board.messages_received[0] > before)
    assert verdict(coordinator.board, 1) is Verdict.ABSENT
    assert {frontend.route().dp_rank for _ in range(6)} == {0}
    assert not engine.board.engine_mark[0] & ON_BEHALF  # it writes its row itself
    with pytest.raises(SettingError, match="outside 0 to"):
        frontend.heard_from(coordinator.board.engines)


def _route_or_none(frontend):
    """The rank of a decision; None if there is none to choose. It leaves nothing booked.

    A booking that is only done stays in flight to a stock engine for 0.1 s, and the next decisions go elsewhere.
    """
    try:
        route = frontend.route()
    except NoEngineAvailable:
        return None
    route.cancel()
    return route.dp_rank


def test_a_stock_engine_that_leaves_is_left_out(group, using):
    """Guards against a mark on behalf that outlives its engine; the next report of those that stay proves them."""
    coordinator, _, stock = mixed(group, using)
    frontend = using(Frontend.attach(group))
    stock[1].close()
    wait_until(lambda: verdict(coordinator.board, 3) is Verdict.ABSENT)
    stock[0].report(0, 0)
    wait_until(lambda: verdict(coordinator.board, 2) is Verdict.ALIVE)
    routes = [frontend.route() for _ in range(9)]
    assert {route.dp_rank for route in routes} == {0, 1, 2}
    stock[0].close()
    wait_until(lambda: verdict(coordinator.board, 2) is Verdict.ABSENT)
    routes += [frontend.route() for _ in range(6)]
    assert {route.dp_rank for route in routes[9:]} == {0, 1}


def test_the_last_report_of_an_engine_that_left_proves_nothing(group, using):
    """Guards against a report that comes after its engine gave up its row in good order, and marks the rank."""
    coordinator, ours, _ = mixed(group, using)
    left = using(StockEngine(coordinator.engine_addresses, 0))
    ours[0].close()
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.ABSENT)
    left.report(3, 0)
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.ALIVE)  # as of a stock engine in its place
    left.close()
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.ABSENT)


def start_heard(engine, wave=0):
    """The next START, past any READY, and past those that a busy machine had repeated in the waves before."""
    while True:
        frames = engine.heard()
        if frames[0] != wire.START_FRAME:
            assert frames == [wire.READY]
        elif (start := wire.decode_start(frames[1])).wave >= wave:
            return start


def test_stock_ranks_that_reconnect_late_get_the_present_wave(group, using):
    """Guards against ranks that missed START while a coordinator was replaced, and whom none calls again."""
    first = using(Remote())
    first.run("coordinator = Coordinator(group=group, dp_size=2)", group=group)
    addresses = first.eval("coordinator.engine_addresses")
    ours = using(Engine.attach(group, 0))
    stock = StockEngine(addresses, 1)
    assert stock.heard() == [wire.READY]
    stock.close()
    first.kill()
    second = using(Coordinator(group=group, dp_size=2))
    ours.receive(None, wave=0)
    wait_until(lambda: second.board.phase is Phase.RUNNING)
    late = using(StockEngine(addresses, 1))
    assert late.heard() == [wire.READY]
    assert start_heard(late) == wire.StartMessage(0, None)


def test_after_a_flood_ranks_get_the_present_wave(group, using):
    """Guards against a START that was lost with the connections that a flood ended."""
    coordinator, ours, stock = mixed(group, using)
    ours[0].receive(None, wave=0)
    for engine in stock:
        assert start_heard(engine).wave == 0
    coordinator._wave.mailbox.call(lambda: setattr(coordinator._wave.flood, "flood", "a test"))
    for engine in stock:
        assert start_heard(engine) == wire.StartMessage(0, None)
