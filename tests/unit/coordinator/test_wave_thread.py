"""Tests of `dpshm.coordinator.wave_thread`, over its real sockets: what it hears, what it says, and that nothing
ends it.
"""

from __future__ import annotations

import random
import threading
import time

import msgspec
import pytest

from dpshm import Coordinator, Engine, Frontend
from dpshm.board.words import DRAINED, MAX_WORD
from dpshm.net import wire
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import MAX_WAVE, Phase
from tests.stock_wire import encode_stats
from tests.support import (
    HOUR_NS,
    NOWHERE,
    Remote,
    StockEngine,
    StockFrontend,
    numbers,
    polled,
    publish_forever,
    verdict,
    wait_until,
)

encode = msgspec.msgpack.encode


@pytest.fixture
def coordinator(group, using):
    """A coordinator of two ranks that publishes quickly."""
    return using(Coordinator(group=group, dp_size=2, stats_interval_ms=5, idle_refresh_ms=60_000))


@pytest.fixture
def stock(coordinator, using):
    """Two stock engines that the coordinator has greeted."""
    return greeted(using, coordinator, 2)


def greeted(using, coordinator, count):
    """So many stock engines, each past READY."""
    engines = [using(StockEngine(coordinator.engine_addresses, dp_rank)) for dp_rank in range(count)]
    for engine in engines:
        assert engine.heard() == [wire.READY]
    for engine in engines:  # READY comes again for those who subscribed after the last
        while engine.input.poll(20):
            assert engine.input.recv_multipart() == [wire.READY]
    return engines


def counter(coordinator, name):
    """A counter of the coordinator's row."""
    return coordinator.board.words[coordinator.board.index(name)]


def steps_shown(coordinator):
    """By rank, the step that its row shows."""
    return coordinator.board.snapshot()["step"].tolist()


def control(coordinator):
    """Wave and phase."""
    return coordinator.board.wave, coordinator.board.phase


# Waves.


def test_a_first_request_wakes_everybody_once(coordinator, stock, using):
    """Guards against a START for each request of a burst, and one that leaves out the engine named."""
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    for engine in (1, 0, 1):
        frontend.send(wire.encode_first_request(engine, 0))
    for engine in stock:
        assert engine.heard() == wire.encode_start(0, None)
    assert control(coordinator) == (0, Phase.WAKING)
    wait_until(lambda: counter(coordinator, "messages_received") >= 3 + 3)
    stock[0].send(wire.encode_wave_started(0, 0))
    frontend.wait_for(lambda state: state.running)
    assert control(coordinator) == (0, Phase.RUNNING)
    assert counter(coordinator, "waves_started") == 1


def test_the_named_engine_is_excluded_if_asked(group, using):
    """Guards against the setting being ignored."""
    coordinator = using(Coordinator(group=group, dp_size=2, exclude_receiver=True))
    engines = greeted(using, coordinator, 2)
    using(StockFrontend(coordinator.stats_publish_address)).send(wire.encode_first_request(1, 0))
    for engine in engines:
        assert engine.heard() == wire.encode_start(0, 1)


def test_a_wave_from_end_to_end(coordinator, stock, using):
    """Guards against a wave that does not grow, or a state that front-ends do not hear of."""
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    for wave in range(3):
        stock[1].send(wire.encode_wave_started(1, wave))
        for engine in stock:
            assert engine.heard() == wire.encode_start(wave, 1)
        assert frontend.wait_for(lambda state: state.running).wave == wave
        stock[0].send(wire.encode_wave_complete(0, wave))
        assert frontend.wait_for(lambda state: not state.running).wave == wave + 1
        assert control(coordinator) == (wave + 1, Phase.PAUSED)


def test_old_news_change_nothing(coordinator, stock, using):
    """Guards against a message of an old wave, late or doubled, that turns the wave back."""
    stock[0].send(wire.encode_wave_complete(0, 6))
    wait_until(lambda: control(coordinator) == (7, Phase.PAUSED))
    stock[0].send(wire.encode_wave_complete(0, 6))
    stock[0].send(wire.encode_wave_complete(0, 2))
    stock[0].send(wire.encode_wave_started(0, 7))
    wait_until(lambda: control(coordinator) == (7, Phase.RUNNING))
    stock[1].send(wire.encode_wave_started(1, 3))
    stock[1].send(wire.encode_wave_started(1, 7))
    stock[1].report(3, 4)  # comes after them
    wait_until(lambda: coordinator.board.load[1])
    assert control(coordinator) == (7, Phase.RUNNING)
    assert stock[0].heard() == wire.encode_start(7, 0)
    assert not stock[0].input.poll(20)


def test_dense_models_have_no_waves_and_their_counts_are_published(group, using):
    """Guards against STARTs to engines that do not step together, and against counts that depend on waves."""
    coordinator = using(Coordinator(group=group, dp_size=2, waves=False, stats_interval_ms=5))
    engines = greeted(using, coordinator, 2)
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    frontend.send(wire.encode_first_request(0, 0))
    engines[0].send(wire.encode_wave_started(0, 5))
    engines[0].send(wire.encode_wave_complete(0, 5))
    engines[1].report(3, 4, 0.5)
    state = frontend.wait_for(lambda state: numbers(state) == [(0, 0, 0.0), (3, 4, 0.5)])
    assert (state.wave, state.running) == (0, False)
    assert control(coordinator) == (0, Phase.PAUSED)
    assert not engines[0].input.poll(20)
    assert coordinator.dropped == {}


def test_a_message_that_the_end_of_its_wave_overtook_begins_no_wave(coordinator, stock):
    """Guards against a wave that no request asked for: two ranks' messages come in any order."""
    stock[0].send(wire.encode_wave_complete(0, 0))
    wait_until(lambda: control(coordinator) == (1, Phase.PAUSED))
    stock[1].send(wire.encode_wave_started(1, 0))
    stock[1].send(wire.encode_wave_started(1, 1))  # comes next, and is the first that counts
    for engine in stock:
        assert engine.heard() == wire.encode_start(1, 1)
    assert control(coordinator) == (1, Phase.RUNNING)
    assert counter(coordinator, "waves_started") == 1


def test_start_is_repeated(group, using):
    """Guards against a wake-up that one lost message prevents."""
    coordinator = using(Coordinator(group=group, dp_size=1, resend_interval_ms=20, wake_timeout_s=3600.0))
    (engine,) = greeted(using, coordinator, 1)
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    frontend.send(wire.encode_first_request(0, 0))
    for _ in range(3):
        assert engine.heard() == wire.encode_start(0, None)


def test_a_start_is_given_up(group, using, caplog):
    """Guards against a wake-up that is repeated for ever."""
    coordinator = using(Coordinator(group=group, dp_size=1, resend_interval_ms=20, wake_timeout_s=0.1))
    (engine,) = greeted(using, coordinator, 1)
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    frontend.send(wire.encode_first_request(0, 0))
    assert engine.heard() == wire.encode_start(0, None)
    wait_until(lambda: control(coordinator) == (0, Phase.PAUSED))
    wait_until(lambda: any("no engine woke up for wave 0" in r.message for r in caplog.records))


def test_ranks_that_the_user_paused_are_no_reason_to_warn(group, using, caplog, monkeypatch):
    """Guards against a warning that asks whether the user paused the ranks, while the rows say so."""
    monkeypatch.setattr("dpshm.board.presence.COORDINATOR_SILENCE_NS", HOUR_NS)  # alone it wakes none
    caplog.set_level("DEBUG", logger="dpshm")
    using(Coordinator(group=group, dp_size=2, resend_interval_ms=20, wake_timeout_s=0.1))
    engines = [using(Engine.attach(group, rank)) for rank in range(2)]
    frontend = using(Frontend.attach(group))

    def give_up(times):
        frontend.wake()
        wait_until(lambda: sum("no engine woke up" in r.message for r in caplog.records) == times)
        return [r.levelname for r in caplog.records if "no engine woke up" in r.message][-1]

    for engine in engines:
        engine.pause()
    assert give_up(1) == "DEBUG"
    engines[1].resume(False)
    assert give_up(2) == "WARNING"  # rank 1 does not poll
    assert "ranks [0, 1] are alive, of which the user paused [0]" in caplog.text


def test_the_board_makes_up_for_lost_messages(group, using):
    """Guards against a group that hangs because one message was lost: the rows tell."""
    coordinator = using(Coordinator(group=group, dp_size=2, resend_interval_ms=20))
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    for engine in engines:
        engine._output.close()  # from here on nothing that they say arrives
    engines[1].receive(None)
    wait_until(lambda: polled(engines))
    wait_until(lambda: control(coordinator) == (0, Phase.RUNNING))


def test_the_board_makes_up_for_a_lost_wave_complete(group, using):
    """Guards against a group that counts as running for ever, so that no front-end wakes it."""
    coordinator = using(Coordinator(group=group, dp_size=2, resend_interval_ms=20))
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    engines[1].receive(None)
    wait_until(lambda: polled(engines))
    wait_until(lambda: control(coordinator) == (0, Phase.RUNNING))
    sockets = [engine._output for engine in engines]
    dumb = [using(StockEngine((NOWHERE, NOWHERE), 0)) for _ in engines]
    for engine, nowhere in zip(engines, dumb, strict=True):
        engine._output = nowhere.output
        engine.wave_complete()
    wait_until(lambda: control(coordinator) == (1, Phase.PAUSED))
    for engine, socket in zip(engines, sockets, strict=True):
        engine._output = socket


def test_a_split_group_is_brought_together(group, using):
    """Guards against ranks that wait in a collective for one that sleeps, because its START was lost."""
    coordinator = using(Coordinator(group=group, dp_size=2, resend_interval_ms=20))
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    engines[0].receive(None)
    wait_until(lambda: control(coordinator) == (0, Phase.RUNNING))
    wait_until(lambda: engines[1].socket.poll(10))
    while engines[1].socket.poll(0):  # its START is lost
        engines[1].socket.recv_multipart()
    wait_until(lambda: polled(engines))


# Publications.


def test_changed_counts_are_published_and_unchanged_ones_are_not(coordinator, stock, using):
    """Guards against front-ends that hear nothing, or the same thing at every interval."""
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    assert numbers(frontend.heard_state()) == [(0, 0, 0.0)] * 2
    assert frontend.is_silent(0.1)
    stock[0].report(1, 2, 0.25, step=1)
    assert numbers(frontend.heard_state()) == [(1, 2, 0.25), (0, 0, 0.0)]
    stock[0].report(1, 2, 0.25, step=2)
    assert frontend.is_silent(0.1)


def test_the_idle_refresh(group, using):
    """Guards against a front-end that missed a publication and never hears the counts again."""
    coordinator = using(Coordinator(group=group, dp_size=1, stats_interval_ms=5, idle_refresh_ms=30))
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    for _ in range(3):
        assert numbers(frontend.heard_state()) == [(0, 0, 0.0)]


def test_the_interval_is_kept(group, using):
    """Guards against a publication for each report."""
    coordinator = using(Coordinator(group=group, dp_size=1, stats_interval_ms=200))
    (engine,) = greeted(using, coordinator, 1)
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    frontend.heard()
    began = time.monotonic()
    heard = 0
    while heard < 3:
        engine.report(random.randrange(1000), 1, step=int(time.monotonic() * 1e6))
        if frontend.socket.poll(1):
            frontend.heard()
            heard += 1
    assert time.monotonic() - began >= 0.39  # the first of the three may come at once


def test_an_interval_of_zero_publishes_changes_alone(group, using):
    """Guards against counts in a deployment whose balancer wants none."""
    coordinator = using(Coordinator(group=group, dp_size=1, stats_interval_ms=0, idle_refresh_ms=10))
    (engine,) = greeted(using, coordinator, 1)
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    assert frontend.heard() == wire.encode_state(None, 0, False)
    engine.report(5, 5)
    assert frontend.is_silent(0.15)
    engine.send(wire.encode_wave_started(0, 0))
    assert frontend.heard() == wire.encode_state(None, 0, True)


def test_without_stock_frontends_nothing_is_published(coordinator, group, using):
    """Guards against the cost of a broadcast without listeners, also after the last one has left."""
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    frontend = using(Frontend.attach(group))
    frontend.route()
    stock = StockFrontend(coordinator.stats_publish_address)
    stock.heard()
    stock.close()
    wait_until(lambda: coordinator._wave.publisher.listeners == 0)
    before = counter(coordinator, "counts_published")
    for i in range(20):
        engines[0].publish(waiting=i, running=i)
        time.sleep(0.005)
    assert counter(coordinator, "counts_published") == before


def test_counts_come_from_the_board_for_our_own_engines(coordinator, group, using):
    """Guards against stock front-ends that see nothing of engines which report on the board alone."""
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    engines[1].publish(waiting=3, running=4, kv_cache_usage=1.0)
    state = frontend.wait_for(lambda state: numbers(state) == [(0, 0, 0.0), (3, 4, 1.0)])
    assert not state.running


def test_the_newest_counts_are_published_although_the_step_before_changed_nothing(coordinator, stock, using):
    """Guards against counts of a group that went idle which are held back for seconds behind older ones."""
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    frontend.heard()
    for step, counts in ((1, (0, 4)), (2, (0, 4)), (3, (0, 4)), (4, (0, 0))):
        for engine in stock:
            engine.report(*counts, step=step)
        wait_until(lambda step=step: steps_shown(coordinator) == [step] * 2)  # two sockets keep no order
    frontend.wait_for(lambda state: numbers(state) == [(0, 4, 0.0)] * 2)
    frontend.wait_for(lambda state: numbers(state) == [(0, 0, 0.0)] * 2)  # within 60 s, the refresh


@pytest.mark.slow
def test_counts_never_mix_two_steps(group, using):
    """Guards against counts of which some ranks' are a step newer: uneven where the ranks are even.

    Lockstep ranks report their steps one after the other. All of them report the step's number here, and take a
    quarter of an interval for it. Steps that this machine held up for longer, on either side, do not count.
    """
    interval_s = 0.04
    coordinator = using(Coordinator(group=group, dp_size=4, stats_interval_ms=40))
    (engine, *_) = greeted(using, coordinator, 4)
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    steps = 40
    held_up = {0}  # before the first step there is none to publish
    ended = threading.Event()

    def report():
        rng = random.Random(1)
        for step in range(1, steps + 1):
            began = time.monotonic()
            for dp_rank in range(4):
                stats = wire.SchedulerStats(1000 + step, step, step, 0, 0.0)
                engine.send(encode_stats(dp_rank, stats, timestamp=0.0))  # one socket keeps them in order
                time.sleep(interval_s / 12)
            wait_until(lambda step=step: steps_shown(coordinator) == [step] * 4)
            if time.monotonic() - began > interval_s / 2:
                held_up.update((step - 1, step, step + 1))
            time.sleep(rng.choice([0.0, 0.9, 1.2]) * interval_s)
        ended.set()

    reporter = threading.Thread(target=report)
    reporter.start()
    seen = []
    last = {(steps, 1000 + steps, 0.0)}
    while not (ended.is_set() and seen and seen[-1] == last):
        seen.append(set(numbers(frontend.heard_state()) or ()))
    reporter.join()
    mixed = [counts for counts in seen if len(counts) != 1 and not {c[0] for c in counts} & held_up]
    assert mixed == []
    whole = [next(iter(counts)) for counts in seen if len(counts) == 1]
    assert whole == sorted(whole)


def test_publishing_goes_on_under_a_flood(coordinator, stock, using):
    """Guards against front-ends that hear nothing as long as one peer keeps the input readable."""
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    flooding = using(Remote())
    flooding.run(
        """
import zmq
from dpshm.net.wire import SchedulerStats
from tests.stock_wire import encode_stats
push = zmq.Context.instance().socket(zmq.PUSH)
push.linger = 0
push.connect(address)
report = encode_stats(0, SchedulerStats(1, 1, 0, 0, 0.0), timestamp=0.0)
""",
        address=coordinator.engine_addresses[1],
    )
    flooding.begin("while not told():\n    for _ in range(200): push.send(report)")
    wait_until(lambda: counter(coordinator, "messages_received") > 2000)
    for i in range(1, 11):
        before = counter(coordinator, "messages_received")
        stock[1].report(i, 0, step=i)
        frontend.wait_for(lambda state, i=i: (numbers(state) or [None, None])[1] == (i, 0, 0.0))
        wait_until(lambda before=before: counter(coordinator, "messages_received") > before + 200)
    stock[0].send(wire.encode_wave_started(0, 9))
    frontend.wait_for(lambda state: state.wave == 9)
    flooding.run("push.close()")


# Engines and their rows.


def test_a_stock_engines_report_is_on_the_board(coordinator, stock, group, using):
    """Guards against dpshm's front-ends that see nothing of stock engines, or count a request twice."""
    board = coordinator.board
    frontend = using(Frontend.attach(group))
    for engine in stock:
        engine.report(0, 0)
    wait_until(lambda: [verdict(board, e) for e in (0, 1)] == [Verdict.ALIVE] * 2)
    _booked = [frontend.route(10, dp_rank=1) for _ in range(2)]
    stock[1].report(2, 5, 0.5, step=8, wave=3)
    names = ["waiting", "running", "in_flight", "in_flight_tokens"]  # all at once: one is stored after the other
    wait_until(lambda: board.snapshot()[1][names].item() == (2, 5, 0, 0))
    row = board.snapshot(time.monotonic_ns())[1]
    assert (row["step"], row["stock"], row["verdict"]) == (8, True, "alive")
    assert row["kv_cache_usage"] == pytest.approx(0.5, abs=1e-4)
    assert row["age_ns"] >= 0
    assert frontend.route().dp_rank == 0


def test_reports_of_an_engine_with_a_row_are_left_alone(coordinator, group, using):
    """Guards against two writers of one row: an engine with dpshm's plugin also sends vLLM's own reports."""
    engine = using(Engine.attach(group, 0))
    engine.publish(waiting=1, running=2)
    also = using(StockEngine(coordinator.engine_addresses, 0))
    also.report(50, 60, step=9)
    also.send(wire.encode_wave_complete(0, 4))
    wait_until(lambda: control(coordinator)[0] == 5)
    row = coordinator.board.snapshot()[0]
    assert (row["waiting"], row["running"], row["stock"]) == (1, 2, False)


def test_a_dead_engines_last_report_does_not_revive_it(coordinator, group, using):
    """Guards against an engine that is chosen for ever although it died: its last report came after its lock went.

    A message that was in a socket's buffer when its sender was killed still arrives.
    """
    using(Engine.attach(group, 1))
    remote = using(Remote())
    remote.run("engine = Engine.attach(group, 0)\nengine.publish(waiting=3, running=3)", group=group)
    remote.kill()
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.DEAD)
    late = using(StockEngine(coordinator.engine_addresses, 0))
    late.report(1, 1, step=5)
    late.send(wire.encode_wave_complete(0, 4))
    wait_until(lambda: control(coordinator)[0] == 5)
    assert verdict(coordinator.board, 0) is Verdict.DEAD
    assert not coordinator.board.snapshot()[0]["stock"]


def test_an_engine_that_takes_its_row_is_no_longer_a_stock_engine(coordinator, stock, group, using):
    """Guards against a rank that is upgraded in place and stays without liveness."""
    stock[0].report(4, 4)
    wait_until(lambda: coordinator.board.snapshot()[0]["stock"])
    engine = using(Engine.attach(group, 0))
    engine.publish(waiting=0, running=1)
    row = coordinator.board.snapshot()[0]
    assert (row["stock"], row["verdict"], row["requests"]) == (False, "alive", 1)


def test_reports_of_a_rank_that_does_not_exist_any_more(coordinator, stock, group, using):
    """Guards against an index from a message that writes into another row, or brings a rank back."""
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    coordinator.scale(1)
    stock[1].report(9, 9)
    for unknown in (70, 1 << 40):
        stock[1].dp_rank = unknown
        stock[1].report(1, 1)
    wait_until(lambda: counter(coordinator, "messages_dropped") == 3)
    assert coordinator.dropped == {"malformed message": 3}
    assert coordinator.board.load[1] == 0
    coordinator.scale(2)
    assert numbers(frontend.wait_for(lambda state: len(state.counts or ()) == 2)) == [(0, 0, 0.0)] * 2


# Rubbish.

RUBBISH = [
    b"",
    b"\xc1",
    b"\xff" * 100,
    b"\x80",
    b"\x90",
    b"\x91\x00",
    b"\xa5hello",
    b"\xdf\xff\xff\xff\xff",
    b"\x91" * 50_000,
    encode(["SCALE_ELASTIC_EP", "many"]),
    encode(["SCALE_ELASTIC_EP", -1]),
    encode(["SCALE_ELASTIC_EP", 1 << 63]),
    encode(["REBOOT", 1]),
    encode([70_000, 1]),
    encode([-1, 1]),
    encode([b"abc", 1]),
    encode([1.5, 1]),
    encode([True, 1]),
    encode([0, (), {"num_running_reqs": -1}]),
    encode([0, (), {"num_running_reqs": "x"}]),
    encode([0, (), {"kv_cache_usage": None}]),
    encode([0, (), None, 0.0, None, None, -1, None]),
    encode([0, (), None, 0.0, None, None, None, 1 << 63]),
    encode([-1, (), None]),
    encode(["0", (), None]),
]


def test_rubbish_on_every_socket_is_counted_and_dropped(coordinator, stock, group, using):
    """Guards against a thread that a wrong or hostile message ends, after which the group never wakes again."""
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    frontend.heard()
    for data in RUBBISH:
        stock[0].send(data)
        if data[:1] not in (b"\x00", b"\x01") and len(data) < wire.MAX_UPSTREAM_BYTES:
            frontend.send(data)
            stock[1].input.send(data)
    stock[0].output.send_multipart([wire.encode_wave_complete(0, 3), b"more"])
    frontend.socket.send_multipart([wire.encode_first_request(0, 0), b"more"])
    # On one socket all of it is rubbish; on each of the other two all but the few that are right on the third,
    # and the one that is too long there.
    wait_until(lambda: counter(coordinator, "messages_dropped") >= 3 * len(RUBBISH) - 7)
    wait_until(lambda: sum(coordinator.dropped.values()) == counter(coordinator, "messages_dropped"))
    assert control(coordinator) == (0, Phase.PAUSED)
    stock[0].report(1, 2)
    assert frontend.wait_for(lambda state: numbers(state) == [(1, 2, 0.0), (0, 0, 0.0)])
    frontend.send(wire.encode_first_request(1, 0))
    assert stock[1].heard() == wire.encode_start(0, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e308, -1.0])
def test_a_usage_that_cannot_be(coordinator, stock, using, value):
    """Guards against a fraction that no word can hold."""
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    stock[0].send(encode([0, (), {"num_running_reqs": 7, "kv_cache_usage": value}]))
    frontend.wait_for(lambda state: (numbers(state) or [(0, 0)])[0][1] == 7)
    assert 0.0 <= coordinator.board.snapshot()[0]["kv_cache_usage"] <= 1.0
    assert coordinator.dropped == {}


def test_counts_beyond_a_word(coordinator, stock):
    """Guards against a count that is too large for its word and ends the thread, or wraps."""
    stock[0].report((1 << 62) - 1, (1 << 62) - 1, step=(1 << 62) - 1)
    wait_until(lambda: coordinator.board.load[0])
    row = coordinator.board.snapshot()[0]
    assert (row["waiting"], row["running"]) == ((1 << 23) - 1, (1 << 24) - 1)
    assert coordinator.dropped == {}


def test_the_last_wave(coordinator, stock, using):
    """Guards against a wave, from a hostile message, after which no peer can decode what the coordinator sends."""
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    for wave in ((1 << 62) - 1, MAX_WAVE + 1, MAX_WAVE):
        stock[0].send(encode([0, (), None, 0.0, None, None, wave, None]))
    wait_until(lambda: control(coordinator)[0] == MAX_WAVE)
    frontend.wait_for(lambda state: state.wave == MAX_WAVE)
    frontend.send(wire.encode_first_request(0, MAX_WAVE))
    for engine in stock:
        assert wire.decode_start(engine.heard()[1]).wave == MAX_WAVE


@pytest.mark.parametrize("name", ["messages_received", "messages_dropped", "starts_sent", "counts_published"])
def test_a_scribbled_counter_does_not_end_it(coordinator, stock, using, name):
    """Guards against trust in shared memory: a number on the board that cannot be counted up any further."""
    coordinator.board.words[coordinator.board.index(name)] = MAX_WORD
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    stock[0].send(b"\xc1")
    frontend.send(wire.encode_first_request(1, 0))
    for engine in stock:
        assert engine.heard() == wire.encode_start(0, None)
    assert coordinator._wave.is_alive()


def test_frontends_that_come_and_go(coordinator, using):
    """Guards against a count of stock front-ends that never comes back to zero, or goes below it."""
    for _ in range(3):
        frontends = [StockFrontend(coordinator.stats_publish_address) for _ in range(3)]
        for frontend in frontends:
            frontend.heard()
        wait_until(lambda: coordinator._wave.publisher.listeners == 3)
        frontends[0].send(wire.UNSUBSCRIBE)
        for frontend in frontends:
            frontend.close()
        wait_until(lambda: coordinator._wave.publisher.listeners == 0)
    last = using(StockFrontend(coordinator.stats_publish_address))
    last.heard()
    wait_until(lambda: coordinator._wave.publisher.listeners == 1)


# Calls from other threads.


def test_calls_from_many_threads(coordinator, group, using):
    """Guards against a call that is lost between threads, and waits for ever."""
    remote = using(Remote())
    remote.run("engine = Engine.attach(group, 0)", group=group)
    publish_forever(remote)

    def drain_and_back(dp_rank):
        for _ in range(40):
            coordinator.drain(dp_rank)
            assert coordinator.board.engine_mark[dp_rank] & DRAINED
            coordinator.undrain(dp_rank)
        done.append(dp_rank)

    done = []
    threads = [threading.Thread(target=drain_and_back, args=(dp_rank,)) for dp_rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1]
    assert verdict(coordinator.board, 0) is Verdict.ALIVE
