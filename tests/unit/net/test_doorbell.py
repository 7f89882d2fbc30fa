"""Doorbells: ranks that front-ends wake themselves, with real sockets and processes."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import closing

import pytest
import zmq

from dpshm import Coordinator, Engine, Frontend
from dpshm.board.files import sockets_path
from dpshm.board.words import pack_control
from dpshm.net import wire
from dpshm.net.doorbell import MOST_RANKS, Doorbell, DoorbellClient
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import Phase
from tests.support import HOUR_NS, LoneBoard, Remote, StockFrontend, polled, wait_until


@pytest.fixture
def folder(group):
    """The folder of the group's sockets."""
    path = sockets_path(group)
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def board(folder, group, using):
    """A group without a coordinator: a rank that wakes up here was rung."""
    return using(LoneBoard(group, dp_size=2))


def sleep_in(board, wave):
    """The group is paused in that wave, as a coordinator would have it."""
    board.words[board.index("control")] = pack_control(wave, Phase.PAUSED)


def ring(folder, data, dp_rank=0):
    """Sends anything at all to a rank's doorbell."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.sendto(data, str(folder / f"bell-{dp_rank}"))


def test_a_frontend_wakes_the_ranks_itself(board, group, using):
    """Guards against ranks that sleep on because only a coordinator can wake them."""
    sleep_in(board, 3)
    engines = [using(Engine.attach(group, e)) for e in range(2)]
    frontend = using(Frontend.attach(group))
    for wave in (3, 4):
        assert not any(engine.poll(0) for engine in engines)
        route = frontend.route()
        chosen, other = engines[route.dp_rank], engines[1 - route.dp_rank]
        assert select.select([other.bell], [], [], 60)[0]
        assert other.poll(0)
        assert not chosen.poll(0)  # it would begin a step without the request
        chosen.receive(frontend.index, 0, route.wave)
        for engine in engines:
            assert (engine.wave, engine.running) == (wave, True)
            engine.wave_complete()
        route.done()
        sleep_in(board, wave + 1)


def test_one_who_waits_is_woken(board, group, using):
    """Guards against a `poll` that waits for the coordinator alone."""
    engine = using(Engine.attach(group, 0))
    frontend = using(Frontend.attach(group))
    with closing(Remote()) as remote:
        remote.run("engine = Engine.attach(group, 1)", group=group)
        remote.begin("answer = engine.poll(60_000)")
        frontend.wake()
        assert remote.eval("answer") is True
        remote.run("engine.close()")
    assert engine.poll(60_000)


def test_what_comes_late_wakes_nobody(folder, board, group, using):
    """Guards against a START of a wave that is over, and one for a rank that the user paused."""
    engine = using(Engine.attach(group, 0))
    engine.receive(None, wave=7)
    engine.wave_complete()
    ring(folder, wire.encode_start(7, None)[1])
    assert not engine.poll(0)
    ring(folder, wire.encode_start(8, None)[1])
    assert engine.poll(0)
    engine.pause()
    ring(folder, wire.encode_start(9, None)[1])
    assert not engine.poll(0)


def test_one_who_runs_takes_them_too(folder, board, group, using):
    """Guards against a bell that stays readable while its rank runs: who waits in a poller would spin."""
    engine = using(Engine.attach(group, 0))
    engine.receive(None, wave=2)
    ring(folder, wire.encode_start(2, None)[1])
    assert select.select([engine.bell], [], [], 60)[0]
    assert engine.poll(0)
    assert not select.select([engine.bell], [], [], 0)[0]
    assert (engine.wave, engine.running) == (2, True)


def test_rubbish_is_dropped(folder, board, group, using, caplog):
    """Guards against an engine that anything but a START ends, or wakes."""
    engine = using(Engine.attach(group, 0))
    rubbish = (b"", b"\xc1", b"\x90", b"\x92\xff\xc0", b"\x92\x01", bytes(1000), wire.READY)
    for data in rubbish:
        ring(folder, data)
    assert not engine.poll(0)
    assert len([r for r in caplog.records if "dropped a message" in r.message]) == len(rubbish)
    ring(folder, wire.encode_start(0, None)[1])
    assert engine.poll(0)


def test_a_flood_ends(folder, board, group, using):
    """Guards against an engine that endless ringing keeps from its work."""
    engine = using(Engine.attach(group, 0))
    engine.receive(None, wave=5)
    engine.wave_complete()
    stop = threading.Event()

    def flood():
        while not stop.is_set():
            ring(folder, wire.encode_start(1, None)[1])

    threads = [threading.Thread(target=flood) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            assert not engine.poll(1)
    finally:
        stop.set()
        while any(thread.is_alive() for thread in threads):
            engine.poll(1)  # they wait while its queue is full


def test_who_does_not_listen_holds_nobody_up(folder):
    """Guards against a front-end that waits for an engine, or raises since there is none."""
    with closing(Doorbell(folder, 1)) as bell, closing(DoorbellClient(folder, 3)) as ringer:
        for wave in range(5000):
            ringer.ring(wave)  # ranks 0 and 2 have none
        starts = [wire.decode_start(data).wave for data in bell.drain()]
        assert starts
        assert starts == list(range(len(starts)))
    folder.rmdir()  # nothing is left in it


def test_who_had_none_is_tried_again_when_the_group_changes(folder, board, group, using):
    """Guards against a rank that is never rung since it was not there once, or was another process."""
    frontend = using(Frontend.attach(group))
    frontend.choose()  # it has seen all that changed by now
    frontend.wake()  # no engine hears it
    with closing(Doorbell(folder, 0)) as bell:
        sleep_in(board, 1)
        frontend.wake()
        board.mark([0], Verdict.DEAD)
        board.mark([0], Verdict.ALIVE)
        frontend.choose()
        sleep_in(board, 2)
        frontend.wake()
        # It tries again ten times a second, too, and may have rung for wave 1.
        assert [wire.decode_start(data).wave for data in bell.drain()][-1:] == [2]


def test_an_ended_group_leaves_its_successor_alone(group, using):
    """Guards against taking down, or ringing, the doorbells of another group of the same name."""
    with Coordinator(group=group, dp_size=1):
        old, frontend = Engine.attach(group, 0), Frontend.attach(group)
    using(Coordinator(group=group, dp_size=1))
    new = using(Engine.attach(group, 0))
    frontend.wake()
    frontend.close()
    assert not select.select([new.bell], [], [], 0)[0]
    old.close()
    ring(sockets_path(group), wire.encode_start(0, None)[1])
    assert select.select([new.bell], [], [], 60)[0]


def test_ranks_without_waves_have_none(folder, group, using):
    """Guards against a dense engine that any process can make run for ever."""
    using(LoneBoard(group, waves=False))
    assert using(Engine.attach(group, 0)).bell is None
    assert list(folder.iterdir()) == []


def test_once_a_wave(folder, board, group, using):
    """Guards against a burst of requests that rings with each until the coordinator has heard of the first."""
    with closing(Doorbell(folder, 0)) as bell:
        frontend = using(Frontend.attach(group))
        for wave in (0, 1):
            sleep_in(board, wave)
            for _ in range(5):
                frontend.route(dp_rank=1).done()
            assert [wire.decode_start(data).wave for data in bell.drain()] == [wave]
        board.words[board.index("control")] = pack_control(2, Phase.RUNNING)
        frontend.route(dp_rank=1).done()
        assert bell.drain() == []


def test_a_wave_that_is_over_before_its_notice_is_not_run_again(group, using):
    """Guards against an empty wave after each short one: its first request came late to the coordinator."""
    coordinator = using(Coordinator(group=group, dp_size=2))
    engines = [using(Engine.attach(group, e)) for e in range(2)]
    wait_until(lambda: all([engine.poll(10) or engine.ready for engine in engines]))  # noqa: C419 - each looks
    board = coordinator.board
    for wave in range(3):
        frontend = using(Frontend.attach(group))  # its own notice waits for a connection
        frontend.route(dp_rank=1).done()
        wait_until(lambda: polled(engines))
        for engine in engines:
            engine.wave_complete()
        wait_until(lambda wave=wave: board.wave == wave + 1)
        stock = using(StockFrontend(coordinator.stats_publish_address))
        stock.send(wire.encode_first_request(0, wave))
        stock.send(wire.encode_drain(1, not wave % 2))  # seen on the board once the notice has been taken
        wait_until(lambda wave=wave: (board.snapshot()["state"][1] == "drained") == (not wave % 2))
        assert (board.phase, board.wave) == (Phase.PAUSED, wave + 1)


def test_a_poller_of_ones_own(board, group, using):
    """Guards against `register` leaving out what wakes a rank, and a bell that a poller cannot name."""
    engine = using(Engine.attach(group, 0))
    poller = zmq.Poller()
    engine.register(poller)
    assert poller.poll(0) == []
    using(Frontend.attach(group)).wake()
    assert engine.bell in dict(poller.poll(60_000))
    assert engine.poll()
    assert poller.poll(0) == []


def test_many_ranks_are_left_to_the_coordinator(folder, group, using):
    """Guards against a `route()` that sends a thousand messages."""
    board = using(LoneBoard(group, engines=MOST_RANKS + 1, dp_size=MOST_RANKS))
    with closing(Doorbell(folder, 0)) as bell:
        frontend = using(Frontend.attach(group))
        frontend.wake()
        assert len(bell.drain()) == 1
        board.marks.set_dp_size(MOST_RANKS + 1)
        frontend.choose()
        sleep_in(board, 1)
        frontend.wake()
        assert bell.drain() == []


def test_who_is_to_be_left_out_is_not_rung(group, using, monkeypatch):
    """Guards against waking the rank that takes the request where the group's setting leaves it out of START."""
    monkeypatch.setattr("dpshm.board.presence.COORDINATOR_SILENCE_NS", HOUR_NS)  # alone, a front-end rings all
    coordinator = using(Coordinator(group=group, dp_size=2, exclude_receiver=True))
    engines = [using(Engine.attach(group, e)) for e in range(2)]
    chosen = using(Frontend.attach(group)).route().dp_rank
    wait_until(lambda: coordinator.board.starts_sent[0])
    assert not select.select([engines[chosen].bell], [], [], 0)[0]
    assert engines[1 - chosen].poll(60_000)


def test_a_successor_has_its_own(board, group, using):
    """Guards against a rank that cannot be rung any more after its process was killed."""
    frontend = using(Frontend.attach(group))
    with closing(Remote()) as remote:
        remote.run("engine = Engine.attach(group, 0)", group=group)
        remote.kill()
    frontend.wake()  # at a bell without an owner
    sleep_in(board, 1)
    board.mark([0], Verdict.DEAD)  # as the watch would
    board.mark([0], Verdict.ALIVE)
    engine = using(Engine.attach(group, 0))
    frontend.wake()
    assert engine.poll(60_000)


def test_without_a_folder_it_is_the_coordinators(group, using, caplog):
    """Guards against an engine that cannot attach because it cannot hang up a doorbell."""
    using(LoneBoard(group, dp_size=2))
    engine = using(Engine.attach(group, 0))
    assert engine.bell is None
    assert "has no doorbell" in caplog.text
    using(Frontend.attach(group)).route().done()
    assert not engine.poll(1)
