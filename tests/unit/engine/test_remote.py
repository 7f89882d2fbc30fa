"""Tests of `dpshm.engine.remote` and `carrier`: engines beyond tcp, with a real coordinator."""

from __future__ import annotations

import time

import pytest
import zmq

from dpshm import Coordinator, Engine, Frontend, HandleClosed, SettingError
from dpshm.engine.carrier import Carrier
from dpshm.engine.remote import RemoteEngine
from dpshm.net import wire
from dpshm.net.keys import make_keys
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import Phase
from tests.support import Remote, polled, verdict, wait_until


@pytest.fixture
def coordinator(group, using):
    """A coordinator of two ranks, of which rank 1 is on another node."""
    return using(Coordinator(group=group, dp_size=2, dp_size_local=1, ready_timeout_s=60))


def rank(coordinator, e=1):
    """A row of the board."""
    return coordinator.board.snapshot()[e]


def test_a_remote_rank_takes_part_like_a_local_one(coordinator, group, using):
    """Guards against a rank beyond tcp that is not chosen, not woken, or whose requests are counted twice."""
    local = using(Engine.attach(group, 0))
    remote = using(RemoteEngine.connect(coordinator.engine_addresses, 1))
    coordinator.wait_ready(60)
    wait_until(lambda: verdict(coordinator.board, 1) is Verdict.ALIVE)  # its row comes over another socket
    frontend = using(Frontend.attach(group))
    routes = [frontend.route(10) for _ in range(8)]
    assert sorted(route.dp_rank for route in routes) == [0] * 4 + [1] * 4
    wait_until(lambda: polled([local, remote]))
    for _ in range(4):
        remote.receive(frontend.index, 10, routes[0].wave)
    assert rank(coordinator)["in_flight"] == 4  # received, and not published
    remote.publish(waiting=1, running=3, prefill_backlog=10, kv_cache_usage=0.5)
    names = ["requests", "in_flight", "waiting", "running", "prefill_backlog", "state"]
    # All at once: one is stored after the other.
    wait_until(lambda: rank(coordinator)[names].item() == (4, 0, 1, 3, 10, "running"))
    for engine in (local, remote):
        engine.wave_complete()
    wait_until(lambda: (coordinator.board.wave, coordinator.board.phase) == (1, Phase.PAUSED))
    wait_until(lambda: rank(coordinator)["wave"] == 1)


def test_a_step_is_seen_while_it_runs(coordinator, using):
    """Guards against a rank whose long step is seen only when it is over."""
    remote = using(RemoteEngine.connect(coordinator.engine_addresses, 1))
    wait_until(lambda: verdict(coordinator.board, 1) is Verdict.ALIVE)
    remote.publish(waiting=0, running=2)
    with remote.step(prefill_tokens=5, batch=2):
        wait_until(lambda: int(coordinator.board.step_start[1]))
        assert 0 < int(coordinator.board.step_start[1]) <= time.monotonic_ns()
    remote.publish(waiting=0, running=2)
    wait_until(lambda: int(coordinator.board.steps[1]) == 1 and not int(coordinator.board.step_start[1]))
    assert int(coordinator.board.prompt_tokens[1]) == 5


def test_the_last_of_a_burst_arrives(coordinator, using):
    """Guards against a limit of the rate that drops the newest row, which is the one that counts."""
    remote = using(RemoteEngine.connect(coordinator.engine_addresses, 1))
    for running in range(500):
        remote.publish(waiting=0, running=running)
    wait_until(lambda: rank(coordinator)["running"] == 499)
    assert int(coordinator.board.messages_received[0]) < 500


def test_a_rank_that_is_killed_is_unknown_and_its_successor_is_alive(coordinator, group, using):
    """Guards against requests to a dead process on another node, and against one that is never let in again."""
    process = using(Remote())
    process.run(
        "from dpshm.engine.remote import RemoteEngine\nengine = RemoteEngine.connect(addresses, 1)",
        addresses=coordinator.engine_addresses,
    )
    wait_until(lambda: verdict(coordinator.board, 1) is Verdict.ALIVE)
    using(Engine.attach(group, 0))
    frontend = using(Frontend.attach(group))
    assert {frontend.route().dp_rank for _ in range(4)} == {0, 1}
    process.kill()
    wait_until(lambda: verdict(coordinator.board, 1) is Verdict.UNKNOWN)
    assert {frontend.route().dp_rank for _ in range(4)} == {0}
    assert frontend.route(dp_rank=1, wake=False).dp_rank == 1  # its caller may know better
    using(RemoteEngine.connect(coordinator.engine_addresses, 1))
    wait_until(lambda: verdict(coordinator.board, 1) is Verdict.ALIVE)
    assert rank(coordinator)["requests"] == 0
    assert rank(coordinator)["incarnation"] == 2


def test_a_rank_that_leaves_is_absent(coordinator, using):
    """Guards against a rank that ended in good order and is called unknown."""
    remote = RemoteEngine.connect(coordinator.engine_addresses, 1)
    wait_until(lambda: verdict(coordinator.board, 1) is Verdict.ALIVE)
    remote.close()
    wait_until(lambda: verdict(coordinator.board, 1) is Verdict.ABSENT)
    remote.close()
    with pytest.raises(HandleClosed):
        remote.publish(waiting=0, running=0)


def test_a_coordinator_that_is_replaced_keeps_the_books(group, using):
    """Guards against bookings in flight that a takeover loses, or doubles, of a rank on another node."""
    settings = {"group": group, "dp_size": 2, "dp_size_local": 1}
    first = using(Remote())
    first.run("coordinator = Coordinator(**settings)", settings=settings)
    remote = using(RemoteEngine.connect(first.eval("coordinator.engine_addresses"), 1))
    frontend = using(Frontend.attach(group))
    wait_until(lambda: verdict(frontend.board, 1) is Verdict.ALIVE)
    _booked = [frontend.route(10, dp_rank=1, wake=False) for _ in range(6)]
    for _ in range(2):
        remote.receive(frontend.index, 10)
    remote.publish(waiting=2, running=0)
    wait_until(lambda: frontend.snapshot()[1]["in_flight"] == 4)
    first.kill()
    remote.receive(frontend.index, 10)
    remote.publish(waiting=3, running=0)
    _later = frontend.route(10, wake=False)  # by bookings: no word can come
    assert _later.dp_rank == 1
    second = using(Coordinator(**settings))
    wait_until(lambda: rank(second)["waiting"] == 3)
    assert (rank(second)["in_flight"], rank(second)["in_flight_tokens"]) == (4, 40)
    assert rank(second)["incarnation"] == 1


def test_keys_are_asked_for(group, using, short_path):
    """Guards against a row that a process without keys may write, and one that a process with keys cannot."""
    make_keys(short_path / "keys")
    keys = {"curve_dir": str(short_path / "keys")}
    coordinator = using(Coordinator(group=group, dp_size=2, dp_size_local=1, **keys))
    stranger = using(RemoteEngine.connect(coordinator.engine_addresses, 0))
    stranger.publish(waiting=9, running=9)
    friend = using(RemoteEngine.connect(coordinator.engine_addresses, 1, **keys))
    friend.publish(waiting=1, running=0)
    wait_until(lambda: rank(coordinator)["waiting"] == 1)
    assert verdict(coordinator.board, 0) is Verdict.ABSENT


def test_a_peer_that_does_not_read_costs_nothing():
    """Guards against an engine that waits, or keeps every row, while its coordinator is stopped."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context.socket(zmq.PULL) as pull:
        pull.rcvhwm = 1
        port = pull.bind_to_random_port("tcp://127.0.0.1")
        carrier = Carrier(f"tcp://127.0.0.1:{port}", None)
        filling = b"x" * 600
        for i in range(20_000):
            carrier.carry(i.to_bytes(4, "little") + filling)
        seen = []
        while not seen or seen[-1] != 19_999:
            assert pull.poll(60_000)
            seen.append(int.from_bytes(pull.recv()[:4], "little"))
        assert seen == sorted(seen)
        assert len(set(seen)) < 19_999
        carrier.close()
    context.term()


def test_wrong_numbers_are_refused(group, using, coordinator):
    """Guards against a rank that a message cannot name, and a carried row on a board that can be attached."""
    for wrong in ({"dp_rank": -1}, {"dp_rank": 1 << 20}, {"dp_rank": 0, "max_frontends": 0}):
        with pytest.raises(SettingError):
            RemoteEngine.connect(coordinator.engine_addresses, **wrong)
    with pytest.raises(SettingError, match=r"Engine\.attach"):
        RemoteEngine.attach(group, 0)


def test_a_stock_coordinator_reads_a_report(group):
    """Guards against a message that ends vLLM's own coordinator: it must be the array that it decodes."""
    received = [wire.Received("a", 1, 2)]
    row = wire.RemoteRow(5, 1, 1, True, wire.pack_words([1] * wire.CARRIED), wire.pack_received(received))
    data = wire.encode_remote_row(3, wire.SchedulerStats(1, 2, 3, 4, 0.5), row)
    stock = wire.decode_engine_message(data)
    assert stock.engine_index == 3
    assert stock.scheduler_stats == wire.SchedulerStats(1, 2, 3, 4, 0.5)
    assert stock.row == row
    assert wire.unpack_words(stock.row.words) == (1,) * wire.CARRIED
    assert wire.unpack_received(stock.row) == received
    assert stock.wave_complete is stock.start_wave is None
