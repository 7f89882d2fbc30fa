"""Tests of `dpshm.coordinator.handle`: a group's life, from the first start to the last sweep."""

from __future__ import annotations

import gc
import logging
import os
import signal
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from dpshm import (
    Board,
    Coordinator,
    Engine,
    Frontend,
    GroupInUse,
    HandleClosed,
    SegmentInvalid,
    SegmentNoSpace,
    SegmentNotFound,
    SettingError,
    StartupTimeout,
)
from dpshm.board import files, layout
from dpshm.coordinator import readiness, takeover
from dpshm.errors import SegmentError
from dpshm.net import wire
from dpshm.net.wire import encode_scale
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import Phase
from tests.support import (
    HOUR_NS,
    TIMEOUT_S,
    LoneBoard,
    Remote,
    RemoteError,
    StockEngine,
    StockFrontend,
    count_fds,
    count_threads,
    leftovers,
    polled,
    publish_forever,
    verdict,
    wait_until,
)


def word(coordinator, name):
    """A word of the coordinator's row."""
    return coordinator.board.words[coordinator.board.index(name)]


def subscribed(coordinator):
    """How many engines are connected, as the coordinator counts them."""
    return coordinator._wave.stock.connections.count


# Start and end.


def test_open_and_close(group):
    """Guards against a coordinator that leaves its board, its sockets or its threads behind."""
    threads = count_threads()
    coordinator = Coordinator(group=group, dp_size=2)
    locks = f"dpshm-{group}.{coordinator.board.segment.header.lock_token}.locks"
    assert leftovers(group) == sorted([f"dpshm-{group}", locks, f"dpshm-{group}.sockets"])
    folder = files.sockets_path(group)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(files.segment_path(group).stat().st_mode) == 0o600
    assert sorted(p.name for p in folder.iterdir()) == ["from-engines", "frontends", "to-engines"]
    assert coordinator.board.dp_size == 2
    assert (coordinator.board.wave, coordinator.board.phase) == (0, Phase.PAUSED)
    assert (word(coordinator, "epoch"), word(coordinator, "coordinator_pid")) == (1, os.getpid())
    coordinator.close()
    coordinator.close()
    assert leftovers(group) == []
    assert count_threads() <= threads


def test_nothing_is_left_open(group):
    """Guards against descriptors and threads that pile up over coordinators in one process, refused ones too."""

    def cycle():
        with Coordinator(group=group, dp_size=1, balancing="external"):
            pass
        with pytest.raises(SettingError):
            Coordinator(group=group, dp_size=1, balancing="hybrid", host="no such host", insecure=True)

    def open_now():
        gc.collect()  # a map keeps its descriptor until the last reference is gone
        return count_fds()

    cycle()
    before, threads = open_now(), count_threads()
    for _ in range(15):
        cycle()
    with Coordinator(group=group, dp_size=1), pytest.raises(GroupInUse):
        Coordinator(group=group, dp_size=1)
    wait_until(lambda: open_now() <= before)  # ZMQ closes in its own thread
    assert count_threads() <= threads


def test_a_second_coordinator_is_refused(group, using):
    """Guards against two coordinators of one group, of which the second steals the first one's sockets."""
    remote = using(Remote())
    remote.run("coordinator = Coordinator(group=group, dp_size=1)", group=group)
    with pytest.raises(GroupInUse, match=f"pid {remote.pid}"):
        Coordinator(group=group, dp_size=1)
    stock = using(StockEngine(remote.eval("coordinator.engine_addresses"), 0))
    assert stock.heard() == [wire.READY]
    remote.run("coordinator.close()")


def test_of_many_that_start_at_once_one_wins(group):
    """Guards against the race of coordinators that start together, on nothing and on what a dead group left."""
    for left_behind in (False, True):
        if left_behind:
            remote = Remote()
            remote.run("coordinator = Coordinator(group=group, dp_size=1)", group=group)
            remote.close()
            assert leftovers(group)

        def start(_):
            try:
                return Coordinator(group=group, dp_size=1)
            except GroupInUse:
                return None

        with ThreadPoolExecutor(4) as pool:
            started = [c for c in pool.map(start, range(4)) if c is not None]
        assert len(started) == 1
        with started[0] as coordinator, Engine.attach(group, 0) as engine:
            engine.receive(None)
            wait_until(lambda board=coordinator.board: board.phase is Phase.RUNNING)
        assert leftovers(group) == []


def test_one_after_another(group, monkeypatch):
    """Guards against a start that fails because the one before it has only just ended."""
    monkeypatch.setattr(takeover, "OPEN_TIMEOUT_S", TIMEOUT_S)  # however long that one takes to end
    running = Coordinator(group=group, dp_size=1)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(10):
            following = pool.submit(Coordinator, group=group, dp_size=1)
            time.sleep(0.01)
            running.close()
            running = following.result()
            assert running.board.segment.linked
            assert word(running, "epoch") == 1
    running.close()


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"dp_size": 0}, "dp_size is 0"),
        ({"dp_size": "many"}, "dp_size"),
        ({"dp_size": 1, "speed": 9}, "speed"),
        ({"dp_size": 2, "max_engines": 1}, "dp_size is 2"),
        ({"dp_size": 1, "group": "../x"}, "cannot name a group"),
        ({"dp_size": 1, "balancing": "remote"}, "balancing"),
    ],
)
def test_settings_that_cannot_be(group, settings, found):
    """Guards against a wrong setting that shows only later, or in another process's log."""
    with pytest.raises(SettingError, match=found):
        Coordinator(**{"group": group, **settings})


def test_a_folder_that_is_too_deep_for_sockets(group, tmp_path, monkeypatch):
    """Guards against a path that ZMQ would cut, and two groups that then share a socket."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setenv("DPSHM_DIR", str(deep))
    with pytest.raises(SettingError, match="107"):
        Coordinator(group=group, dp_size=1)
    assert list(deep.iterdir()) == []


def test_a_sockets_folder_that_others_can_enter(group):
    """Guards against sockets in a folder that another user prepared."""
    folder = files.sockets_path(group)
    folder.mkdir(mode=0o755)
    folder.chmod(0o777)
    with pytest.raises(SettingError, match="drwxrwxrwx"):
        Coordinator(group=group, dp_size=1)
    assert not files.segment_path(group).exists()
    folder.rmdir() if folder.exists() else None


def test_a_folder_of_sockets_that_comes_and_goes(group):
    """Guards against a start that fails because the coordinator before it removes its folder at that instant."""
    folder = files.sockets_path(group)
    ended = threading.Event()

    def come_and_go():
        while not ended.is_set():
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            with suppress(FileNotFoundError):
                folder.rmdir()

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(15_000):
            fd = files.lock_sockets_folder(folder)
            assert fd is not None
            fd.close()
    finally:
        ended.set()
        other.join()
        with suppress(FileNotFoundError):
            folder.rmdir()


def test_a_folder_that_does_not_exist(group, monkeypatch):
    """Guards against a start that hangs, or leaves threads, when there is no place for the board."""
    threads = count_threads()
    monkeypatch.setenv("DPSHM_DIR", "/nowhere")
    with pytest.raises(SegmentError, match="DPSHM_DIR"):
        Coordinator(group=group, dp_size=1)
    assert count_threads() <= threads


def test_dpshm_dir_is_honoured(group, short_path, monkeypatch):
    """Guards against a group that is created in one place and looked for in another."""
    monkeypatch.setenv("DPSHM_DIR", str(short_path))
    with Coordinator(group=group, dp_size=1), Engine.attach(group, 0), Frontend.attach(group) as frontend:
        assert frontend.route().dp_rank == 0
        assert sorted(p.suffix for p in short_path.iterdir()) == ["", ".locks", ".sockets"]
    assert list(short_path.iterdir()) == []


def test_a_forked_copy_does_nothing(group, using):
    """Guards against a forked child of the server whose exit removes its parent's group."""
    remote = using(Remote())
    remote.run(
        """
coordinator = Coordinator(group=group, dp_size=1)
if (child := os.fork()) == 0:
    coordinator.close()
    del coordinator
    sys = __import__("sys")
    os._exit(0)
status = os.waitpid(child, 0)[1]
""",
        group=group,
    )
    assert remote.eval("status") == 0
    assert len(leftovers(group)) == 3
    with Engine.attach(group, 0) as engine:
        engine.receive(None)
        wait_until(lambda: remote.eval("coordinator.board.phase") == Phase.RUNNING)
    remote.run("coordinator.close()")


def test_an_exit_without_close(group, using):
    """Guards against a group that stays behind when a program just ends."""
    remote = using(Remote())
    remote.run(
        """
import subprocess, sys
code = "import sys; from dpshm import Coordinator; c = Coordinator(group=sys.argv[1], dp_size=1)"
ended = subprocess.run([sys.executable, "-c", code, group], env={**os.environ, "PYTHONPATH": path}, timeout=60)
""",
        group=group,
        path=os.path.dirname(os.path.dirname(files.__file__)),
    )
    assert remote.eval("ended.returncode") == 0
    assert leftovers(group) == []


def test_an_interrupt_while_it_starts(group):
    """Guards against Ctrl-C in the constructor, after which a watch thread and a board stay for good."""
    threads, starting, interrupted = count_threads(), [], 0

    def interrupt(*_):
        if starting:
            starting.clear()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        us = threading.main_thread().ident
        for i in range(400):  # how long it takes to start is the machine's affair
            if interrupted > 9:
                break
            late = threading.Timer(i % 40 * 0.0003, signal.pthread_kill, (us, signal.SIGUSR1))
            late.start()
            coordinator = None
            try:
                starting.append(True)
                coordinator = Coordinator(group=group, dp_size=1)
                starting.clear()
            except KeyboardInterrupt:
                interrupted += coordinator is None
            late.join()
            if coordinator is not None:
                coordinator.close()
            assert leftovers(group) == [], i
            # A thread whose start was interrupted may begin late: it finds its work cancelled, and ends.
            wait_until(lambda: count_threads() <= threads)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert interrupted > 3


def test_a_closed_coordinator_says_so(group):
    """Guards against calls that wait for a thread that has ended, or fail with errors of released memory."""
    coordinator = Coordinator(group=group, dp_size=1)
    coordinator.close()
    for use in (lambda: coordinator.scale(2), lambda: coordinator.drain(0), lambda: coordinator.undrain(0)):
        with pytest.raises(HandleClosed):
            use()
    assert coordinator.dropped == {}


# Ready.


def test_ready_when_all_ranks_are_there(group, using):
    """Guards against a group that is said to be complete before it is."""
    coordinator = using(Coordinator(group=group, dp_size=3))
    engines = [using(Engine.attach(group, 0)), using(Engine.attach(group, 2))]
    wait_until(lambda: subscribed(coordinator) == 2)
    with pytest.raises(StartupTimeout, match=r"0\.05 s.*\[1\]"):
        coordinator.wait_ready(0.05)
    assert word(coordinator, "ready") == 0
    assert not any(e.poll() or e.ready for e in engines)
    engines.append(using(Engine.attach(group, 1)))
    coordinator.wait_ready()
    assert word(coordinator, "ready") == 1
    for engine in engines:
        wait_until(lambda engine=engine: engine.poll(10) or engine.ready)


def test_a_late_engine_hears_ready_again(group, using):
    """Guards against a restarted engine that waits for ever for a READY that was sent long ago."""
    coordinator = using(Coordinator(group=group, dp_size=2))
    using(Engine.attach(group, 0))
    with Engine.attach(group, 1):
        coordinator.wait_ready()
    again = using(Engine.attach(group, 1))
    wait_until(lambda: again.poll(10) or again.ready)


def test_the_deadline_names_who_is_missing(group, using):
    """Guards against a start that waits for ever, and an error that does not say for whom."""
    coordinator = using(Coordinator(group=group, dp_size=4, ready_timeout_s=1.5))
    using(Engine.attach(group, 0))
    using(Engine.attach(group, 2))
    with pytest.raises(StartupTimeout, match=r"2 of 4 engines .* within 1\.5 s.*\[1, 3\]"):
        coordinator.wait_ready()


def test_after_the_deadline_ready_still_waits_for_all(group, using):
    """Guards against an engine that is told to go although others are still missing, because it came late."""
    coordinator = using(Coordinator(group=group, dp_size=3, ready_timeout_s=0.1))
    first = using(Engine.attach(group, 0))
    with pytest.raises(StartupTimeout):
        coordinator.wait_ready()
    second = using(Engine.attach(group, 1))
    wait_until(lambda: subscribed(coordinator) == 2)
    for engine in (first, second):
        assert not engine.poll(100)
        assert not engine.ready
    engines = [first, second, using(Engine.attach(group, 2))]
    for engine in engines:
        wait_until(lambda engine=engine: engine.poll(10) or engine.ready)
    wait_until(lambda: word(coordinator, "ready") == 1)


def test_engines_that_leave_are_not_counted(group, using):
    """Guards against READY for one engine that came twice."""
    coordinator = using(Coordinator(group=group, dp_size=2))
    for _ in range(3):
        engine = Engine.attach(group, 0)
        wait_until(lambda: subscribed(coordinator) == 1)
        engine.close()
        wait_until(lambda: subscribed(coordinator) == 0)
    engine = using(Engine.attach(group, 0))
    wait_until(lambda: subscribed(coordinator) == 1)
    assert not engine.poll(20)
    assert not engine.ready


def test_an_engine_that_comes_back_counts_once(group, using, monkeypatch):
    """Guards against READY, and a stock engine on the board, for one that is back before its old link is gone."""
    recount_ns = readiness.RECOUNT_NS
    monkeypatch.setattr(readiness, "RECOUNT_NS", HOUR_NS)  # however long the old link takes to go
    coordinator = using(Coordinator(group=group, dp_size=2))
    before = StockEngine(coordinator.engine_addresses, 0)
    wait_until(lambda: subscribed(coordinator) == 1)
    again = using(StockEngine(coordinator.engine_addresses, 0))
    wait_until(lambda: subscribed(coordinator) == 2)
    monkeypatch.setattr(readiness, "RECOUNT_NS", recount_ns)
    before.close()
    wait_until(lambda: subscribed(coordinator) == 1 and coordinator._wave.ranks.readiness.settled)
    coordinator._wave.mailbox.call(lambda: None)  # the turn that counted them again is over
    assert word(coordinator, "ready") == 0
    assert coordinator.board.snapshot()["state"].tolist() == ["absent", "absent"]
    other = using(StockEngine(coordinator.engine_addresses, 1))
    assert [again.heard(), other.heard()] == [[wire.READY]] * 2
    assert coordinator.board.snapshot()["stock"].tolist() == [False, False]  # neither has reported


def test_a_close_ends_the_wait(group):
    """Guards against a launcher that waits for a coordinator which is gone."""
    coordinator = Coordinator(group=group, dp_size=1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(coordinator.wait_ready)
        time.sleep(0.02)
        coordinator.close()
        with pytest.raises(StartupTimeout, match="closed"):
            waiting.result()


# Modes.


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("ipc", "ipc", 100)),
        ({"dp_size_local": 2}, ("ipc", "ipc", 100)),
        ({"dp_size_local": 1}, ("ipc", "tcp", 100)),
        ({"balancing": "hybrid"}, ("tcp", "ipc", 100)),
        ({"balancing": "hybrid", "dp_size_local": 0}, ("tcp", "tcp", 100)),
        ({"balancing": "external", "dp_size_local": 1}, ("tcp", "tcp", 0)),
        ({"balancing": "external", "stats_interval_ms": 20}, ("tcp", "ipc", 20)),
    ],
)
def test_modes(group, using, settings, expected):
    """Guards against sockets that other nodes cannot reach, or that needlessly leave the node; all must work."""
    frontends, engines, interval_ms = expected
    coordinator = using(Coordinator(group=group, dp_size=2, **settings))
    assert coordinator.stats_publish_address.split("://")[0] == frontends
    assert [a.split("://")[0] for a in coordinator.engine_addresses] == [engines] * 2
    assert coordinator.settings.interval_ms == interval_ms
    header = coordinator.board.segment.header
    assert header.stats_address == coordinator.stats_publish_address
    assert (header.engine_input_address, header.engine_output_address) == coordinator.engine_addresses
    stock = using(StockFrontend(coordinator.stats_publish_address))
    assert (stock.heard_state().counts is None) == (interval_ms == 0)
    handles = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    for engine in handles:
        wait_until(lambda engine=engine: engine.poll(10) or engine.ready)
    using(Frontend.attach(group)).route(dp_rank=1)
    wait_until(lambda: polled(handles))
    stock.wait_for(lambda state: state.running)


def test_hosts(group, using):
    """Guards against addresses of another interface than the one that was asked for."""
    coordinator = using(Coordinator(group=group, dp_size=1, balancing="hybrid", host="127.0.0.2"))
    assert coordinator.stats_publish_address.startswith("tcp://127.0.0.2:")
    using(StockFrontend(coordinator.stats_publish_address)).heard()


# Scaling.


def test_scaling_up_and_down(group, using):
    """Guards against a group that cannot grow or shrink while it works, or forgets its wave when it does."""
    coordinator = using(Coordinator(group=group, dp_size=2, max_engines=4))
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    frontend = using(Frontend.attach(group))
    engines[0].receive(None, wave=3)
    wait_until(lambda: coordinator.board.phase is Phase.RUNNING)
    coordinator.scale(4, force=True)
    assert (coordinator.board.dp_size, coordinator.board.wave, coordinator.board.phase) == (4, 3, Phase.RUNNING)
    assert coordinator.board.snapshot()["state"].tolist()[2:] == ["absent", "absent"]
    for engine in engines:
        engine.publish(waiting=0, running=9)
    engines += [using(Engine.attach(group, dp_rank)) for dp_rank in (2, 3)]
    for engine in engines[2:]:
        wait_until(lambda engine=engine: engine.poll(10) or engine.ready)
        assert engine.wave == 3
    assert {frontend.route().dp_rank for _ in range(6)} == {2, 3}
    coordinator.scale(1, force=True)
    assert {frontend.route().dp_rank for _ in range(6)} == {0}
    with pytest.raises(SettingError):
        frontend.route(dp_rank=1)
    assert len(frontend.snapshot()) == 1
    for n in (0, 5, -1):
        with pytest.raises(SettingError, match="1 to 4"):
            coordinator.scale(n)
    assert coordinator.board.dp_size == 1


def test_a_rank_that_comes_back_starts_at_zero(group, using):
    """Guards against a rank that was taken away and comes back with its old load, its old drain or its verdict."""
    coordinator = using(Coordinator(group=group, dp_size=2, waves=False))
    remote = using(Remote())
    remote.run("engine = Engine.attach(group, 1)\nengine.publish(waiting=5, running=5)", group=group)
    coordinator.drain(1)
    coordinator.scale(1)
    remote.kill()
    coordinator.scale(2)
    row = coordinator.board.snapshot()[1]
    assert (row["state"], row["requests"], row["drained"], row["pid"]) == ("absent", 0, False, 0)
    using(Engine.attach(group, 1))
    assert verdict(coordinator.board, 1) is Verdict.ALIVE


ATTACH_3 = """
from dpshm.engine import row
stock = row.wait_for_rank
def wait_for_rank(*arguments):
    open(path, "w").close()
    stock(*arguments)
row.wait_for_rank = wait_for_rank
engine = Engine.attach(group, 3, timeout_s=60)
"""


@pytest.fixture
def waits_for_rank_3(group, using, tmp_path):
    """`waits_for_rank_3()` gives a process that has attached to the group's board, and waits for its rank."""

    def begin():
        remote, path = using(Remote()), tmp_path / "waits"
        remote.begin(ATTACH_3, group=group, path=str(path))
        wait_until(path.exists)
        return remote

    return begin


def test_an_engine_that_comes_before_the_group_grows(group, using, waits_for_rank_3):
    """Guards against a new rank that is refused because it came an instant before the group was scaled."""
    coordinator = using(Coordinator(group=group, dp_size=1, max_engines=4))
    remote = waits_for_rank_3()
    coordinator.scale(4)
    remote.run("pass")  # once it is attached
    assert verdict(coordinator.board, 3) is Verdict.ALIVE


def test_an_engine_that_waits_for_its_rank_sees_the_group_end(group, waits_for_rank_3):
    """Guards against an engine that waits for a group that is gone."""
    with Coordinator(group=group, dp_size=1, max_engines=4):
        remote = waits_for_rank_3()
    with pytest.raises(RemoteError, match="ended while rank 3 attached"):
        remote.run("pass")


@pytest.mark.parametrize("rest", ["a rank is not drained", "a rank has a request", "a wave runs"])
def test_lockstep_ranks_are_scaled_at_rest(group, using, rest):
    """Guards against ranks that wait for ever in a collective whose size changed under them."""
    coordinator = using(Coordinator(group=group, dp_size=2, max_engines=4))
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    frontend = using(Frontend.attach(group))
    route = frontend.route(dp_rank=1)
    if rest != "a rank has a request":
        route.cancel()
    if rest == "a wave runs":
        engines[0].receive(None)
        engines[0].finished(1)
        wait_until(lambda: coordinator.board.phase is Phase.RUNNING)
    for dp_rank in range(1 if rest == "a rank is not drained" else 2):
        coordinator.drain(dp_rank)
    found = {
        "a rank is not drained": r"ranks \[1\] are not drained",
        "a rank has a request": "rank 1 has 1 request",
        "a wave runs": "wave 0 is running",
    }
    with pytest.raises(SettingError, match=found[rest] + r"(.|\n)*`dpshm scale N --group "):
        coordinator.scale(4)
    assert coordinator.board.dp_size == 2
    route.cancel()
    for engine in engines:
        engine.receive(None)
        engine.finished(1)
        engine.wave_complete()
    wait_until(lambda: (coordinator.board.wave, coordinator.board.phase) == (1, Phase.PAUSED))
    for dp_rank in (0, 1):
        coordinator.drain(dp_rank)
    coordinator.scale(4)
    assert coordinator.board.snapshot()["drained"].tolist() == [True] * 4  # until all have been restarted


def test_independent_ranks_are_scaled_at_work(group, using):
    """Guards against a group without waves that has to stop in order to grow."""
    coordinator = using(Coordinator(group=group, dp_size=1, max_engines=2, waves=False))
    using(Engine.attach(group, 0)).publish(waiting=0, running=3)
    coordinator.scale(2)
    assert coordinator.board.snapshot()["drained"].tolist() == [False, False]


def test_scaling_holds_a_row_while_it_clears_it(group, using, monkeypatch):
    """Guards against a rank whose row is cleared under it because it came while the group grew."""
    coordinator = using(Coordinator(group=group, dp_size=1, max_engines=3, waves=False))
    observer = using(Board.attach(group))
    held = []

    class Names(tuple):
        def __iter__(self):
            held.append(observer.engine_alive(2))
            return super().__iter__()

    monkeypatch.setattr(layout, "ENGINE_WORDS", Names(layout.ENGINE_WORDS))
    coordinator.scale(3)
    assert held[-1]
    assert not observer.engine_alive(2)
    with Engine.attach(group, 2) as engine:
        engine.publish(waiting=0, running=4)
        coordinator.scale(1)
        coordinator.scale(3)
        assert coordinator.board.snapshot()[2]["running"] == 4
        wait_until(lambda: verdict(coordinator.board, 2) is Verdict.ALIVE)


def test_scaling_by_message(group, using):
    """Guards against vLLM's own scaling message being ignored, or ending the thread when it is wrong."""
    coordinator = using(Coordinator(group=group, dp_size=2, max_engines=4))
    stock = using(StockFrontend(coordinator.stats_publish_address))
    stock.send(encode_scale(4))
    stock.wait_for(lambda state: len(state.counts or ()) == 4)
    stock.send(encode_scale(5))
    stock.send(encode_scale(0))
    stock.send(encode_scale(1))
    stock.wait_for(lambda state: len(state.counts or ()) == 1)
    assert coordinator.dropped == {"scaling refused": 2}


def test_draining(group, using):
    """Guards against an engine that gets requests although its operator took it out."""
    coordinator = using(Coordinator(group=group, dp_size=2))
    for dp_rank in (0, 1):
        using(Engine.attach(group, dp_rank))
    frontend = using(Frontend.attach(group))
    coordinator.drain(0)
    routes = [frontend.route() for _ in range(6)]
    assert {route.dp_rank for route in routes} == {1}
    coordinator.undrain(0)
    assert {frontend.route().dp_rank for _ in range(6)} == {0}
    for wrong in (-1, 2):
        with pytest.raises(SettingError, match="0 to 1"):
            coordinator.drain(wrong)


# Taking over.


@pytest.mark.parametrize("balancing", ["internal", "external"])
def test_a_killed_coordinator_is_replaced(group, using, balancing):
    """Guards against a restart that forgets waves, bookings or drains, or that the others never notice."""
    first = using(Remote())
    first.run(
        "coordinator = Coordinator(group=group, dp_size=2, balancing=balancing, dp_size_local=2)\n"
        "coordinator.drain(1)",
        group=group,
        balancing=balancing,
    )
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    frontend = using(Frontend.attach(group))
    wait_until(lambda: all([engine.poll(10) or engine.ready for engine in engines]))  # noqa: C419 - each looks
    engines[1].receive(None, wave=4)
    wait_until(lambda: engines[0].poll(10))
    wait_until(lambda: frontend.board.phase is Phase.RUNNING)
    booked = [frontend.route(10) for _ in range(3)]
    first.kill()

    # Nothing that a request needs is in the coordinator.
    booked += [frontend.route(10) for _ in range(3)]
    assert {route.dp_rank for route in booked} == {0}
    assert frontend.snapshot()[0]["in_flight"] == 6

    second = using(Coordinator(group=group, dp_size=2, balancing=balancing, dp_size_local=2))
    board = second.board
    assert (word(second, "epoch"), word(second, "coordinator_pid")) == (2, os.getpid())
    assert (board.wave, board.phase) == (4, Phase.RUNNING)
    assert board.snapshot()["state"].tolist() == ["running", "drained"]
    assert board.snapshot()[0]["in_flight_tokens"] == 60
    second.wait_ready(0)
    for engine in engines:
        engine.wave_complete()
    wait_until(lambda: (board.wave, board.phase) == (5, Phase.PAUSED))
    wait_until(lambda: polled(engines) or subscribed(second) == 2)  # ZMQ subscribes again when a socket is used

    frontend.route()
    wait_until(lambda: polled(engines))
    assert {engine.wave for engine in engines} == {5}
    wait_until(lambda: board.phase is Phase.RUNNING)
    assert second.dropped == {}


def test_a_start_message_of_an_engine_arrives_after_the_restart(group, using):
    """Guards against a group that stays asleep because its coordinator was away when an engine woke."""
    first = using(Remote())
    first.run("coordinator = Coordinator(group=group, dp_size=2)", group=group)
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    wait_until(lambda: engines[1].poll(10) or engines[1].ready)
    first.kill()
    (files.sockets_path(group) / "bell-0").unlink()  # nor does rank 1 wake it
    engines[1].receive(None, wave=0)
    assert not engines[0].poll(20)
    using(Coordinator(group=group, dp_size=2))
    wait_until(lambda: engines[0].poll(10))


def test_a_takeover_while_waking(group, using):
    """Guards against a wake-up that dies with the coordinator that had begun it."""
    first = using(Remote())
    first.run("coordinator = Coordinator(group=group, dp_size=2)", group=group)
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    stock = using(StockFrontend(first.eval("coordinator.stats_publish_address")))
    stock.send(wire.encode_first_request(0, 0))
    wait_until(lambda: engines[0].board.phase is Phase.WAKING)
    first.kill()
    second = using(Coordinator(group=group, dp_size=2))
    wait_until(lambda: polled(engines))
    wait_until(lambda: second.board.phase is Phase.RUNNING)


@pytest.mark.parametrize("change", [{"waves": False}, {"balancing": "hybrid"}, {"counts_with_kv": False}])
def test_a_takeover_with_other_settings_is_refused(group, using, change):
    """Guards against a coordinator whose idea of the group is not that of those who live in it."""
    first = using(Remote())
    first.run("coordinator = Coordinator(group=group, dp_size=1)", group=group)
    engine = using(Engine.attach(group, 0))
    first.kill()
    with pytest.raises(SettingError, match=next(iter(change))):
        Coordinator(group=group, dp_size=1, **change)
    assert engine.board.segment.linked
    assert not engine.board.coordinator_alive()
    using(Coordinator(group=group, dp_size=1))


def test_a_takeover_keeps_the_size(group, using):
    """Guards against a restart that undoes an elastic scaling."""
    first = using(Remote())
    first.run("coordinator = Coordinator(group=group, dp_size=2)\ncoordinator.scale(3)", group=group)
    using(Engine.attach(group, 2))
    first.kill()
    assert using(Coordinator(group=group, dp_size=2)).board.dp_size == 3


def test_what_the_dead_left_is_swept(group):
    """Guards against a group that can never be started again after everything was killed at once."""
    remotes = [Remote() for _ in range(3)]
    remotes[0].run("coordinator = Coordinator(group=group, dp_size=1, dp_size_local=1)", group=group)
    remotes[1].run("engine = Engine.attach(group, 0)\nengine.receive(None, wave=7)", group=group)
    remotes[2].run("frontend = Frontend.attach(group)\nfrontend.route()", group=group)
    for remote in remotes:
        remote.close()
    assert len(leftovers(group)) == 3
    with Coordinator(group=group, dp_size=1) as coordinator:
        assert word(coordinator, "epoch") == 1
        assert coordinator.board.wave == 0
        assert not coordinator.board.sent_requests.any()
        Engine.attach(group, 0).close()


def test_a_damaged_segment_of_the_dead_is_swept(group):
    """Guards against a group that cannot start because of a file that no process can use."""
    files.segment_path(group).write_bytes(b"\0" * 8192)
    with Coordinator(group=group, dp_size=1):
        pass


def test_a_damaged_segment_of_the_living_is_not_swept(group, using):
    """Guards against a start that pulls the board away from under processes of another version."""
    board = using(LoneBoard(group))
    assert board.lock_engine(0)
    os.pwrite(board.segment.fileno(), b"\xff" * 8, 8)
    with pytest.raises(SegmentInvalid, match="version"):
        Coordinator(group=group, dp_size=1)
    assert board.segment.linked


def test_an_observer_does_not_keep_a_dead_group_alive(group, using):
    """Guards against a tool that merely looks and thereby prevents a fresh start."""
    remote = using(Remote())
    remote.run("coordinator = Coordinator(group=group, dp_size=1)\ncoordinator.scale(5)", group=group)
    observer = using(Board.attach(group))
    remote.kill()
    with Coordinator(group=group, dp_size=1) as coordinator:
        assert coordinator.board.dp_size == 1
        assert not observer.segment.linked


def test_a_segment_unlinked_under_the_living(group, using, caplog):
    """Guards against a clean-up job that ends a running deployment, or goes unnoticed."""
    coordinator = using(Coordinator(group=group, dp_size=1))
    engine = using(Engine.attach(group, 0))
    frontend = using(Frontend.attach(group))
    with caplog.at_level(logging.WARNING):
        files.segment_path(group).unlink()
        wait_until(
            lambda: any(
                "dpshm.coordinator.watch_thread" in r.name and "unlinked" in r.message for r in caplog.records
            )
        )

        def routed():
            frontend.route().cancel()
            return any("dpshm.frontend.decisions" in r.name and "unlinked" in r.message for r in caplog.records)

        wait_until(routed)
    engine.publish(waiting=0, running=4)
    assert frontend.snapshot()[0]["running"] == 4
    with pytest.raises(SegmentNotFound, match=group):
        Frontend.attach(group)
    with pytest.raises(SegmentNotFound, match=group):
        Engine.attach(group, 0)
    frontend.route()
    wait_until(lambda: engine.poll(10))
    coordinator.close()
    files.clear_sockets_folder(files.sockets_path(group))


def test_a_folder_that_is_full(group, using, short_path):
    """Guards against a start on a full tmpfs that leaves something behind, or dies with SIGBUS later."""
    remote = using(Remote())
    try:
        remote.run("import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)")
        mounted = remote.eval(
            "libc.unshare(0x20000) == 0 and libc.mount(b'none', b'/', None, 0x44000, None) == 0 and "
            "libc.mount(b'tmpfs', path, b'tmpfs', 0, b'size=16k') == 0",
            path=os.fsencode(short_path),
        )
    except RemoteError as e:
        pytest.skip(str(e))
    if not mounted:
        pytest.skip("this user may not mount a tmpfs of its own")
    remote.run("os.environ['DPSHM_DIR'] = path", path=str(short_path))
    with pytest.raises(RemoteError, match=SegmentNoSpace.__name__):
        remote.run("Coordinator(group=group, dp_size=1)", group=group)
    assert remote.eval("os.listdir(path)") == []


def test_ranks_wake_up_while_their_coordinator_is_stopped(group, using):
    """Guards against ranks that cannot begin to work because a coordinator hangs, or is slow or dead."""
    remote = using(Remote())
    remote.run("coordinator = Coordinator(group=group, dp_size=3)", group=group)
    engines = [using(Engine.attach(group, e)) for e in range(3)]
    wait_until(lambda: all([engine.poll(10) or engine.ready for engine in engines]))  # noqa: C419 - each looks
    frontend = using(Frontend.attach(group))
    board = frontend.board
    for wave in range(5):
        remote.signal(signal.SIGSTOP)
        route = frontend.route()
        engines[route.dp_rank].receive(frontend.index, 0, route.wave)
        wait_until(lambda: polled(engines))
        route.done()
        assert [engine.wave for engine in engines] == [wave] * 3
        assert board.phase is Phase.PAUSED  # as far as the coordinator knows
        remote.signal(signal.SIGCONT)
        wait_until(lambda wave=wave: board.phase is Phase.RUNNING and board.wave == wave)
        for engine in engines:
            engine.wave_complete()
        wait_until(lambda wave=wave: board.phase is Phase.PAUSED and board.wave == wave + 1)
    remote.run("coordinator.close()")


def test_an_engine_goes_on_while_its_coordinator_is_stopped(group, using):
    """Guards against engines and front-ends that wait for a coordinator which is alive and does nothing."""
    remote = using(Remote())
    remote.run("coordinator = Coordinator(group=group, dp_size=2)", group=group)
    others = using(Remote())
    others.run("engine = Engine.attach(group, 1)", group=group)
    engine = using(Engine.attach(group, 0))
    frontend = using(Frontend.attach(group))
    remote.signal(signal.SIGSTOP)
    publish_forever(others, running=50)
    for i in range(300):
        engine.receive(None, wave=i)
        engine.publish(waiting=0, running=1)
        frontend.route().done()
        engine.wave_complete()
    others.kill()
    # The lock tells that it is dead, also while no coordinator does.
    wait_until(lambda: {frontend.route().dp_rank for _ in range(100)} == {0})
    remote.signal(signal.SIGCONT)
    wait_until(lambda: verdict(engine.board, 1) is Verdict.DEAD)
    remote.run("coordinator.close()")
