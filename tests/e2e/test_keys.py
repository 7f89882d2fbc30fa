"""Keys: peers with keys take part over tcp, peers without are refused and logged, and the coordinator goes on."""

from __future__ import annotations

import logging
import shutil
import socket
from contextlib import suppress

import pytest
import zmq

from dpshm import Coordinator, CoordinatorProcess, Engine, Frontend, SettingError
from dpshm.net import wire
from dpshm.net.keys import ClientKeys, client_keys, make_keys
from dpshm.ops.doctor.group import check_group
from dpshm.ops.drain import set_drained
from dpshm.rules.waves import Phase
from tests.support import StockFrontend, count_fds, count_threads, polled, wait_until

TCP = {"balancing": "hybrid", "dp_size_local": 0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Keys of a group; the environment does not name them."""
    monkeypatch.delenv("DPSHM_CURVE_DIR", raising=False)
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def coordinator(group, using, folder):
    """A coordinator of two ranks, all of whose sockets are tcp and ask for keys."""
    return using(Coordinator(group=group, dp_size=2, curve_dir=str(folder), **TCP))


def go_round(coordinator, engines, frontend):
    """One wave from its first request to its end."""
    wave = coordinator.board.wave
    route = frontend.route(10, dp_rank=1)
    wait_until(lambda: polled(engines))
    engines[1].receive(frontend.index, 10, route.wave)
    engines[1].publish(waiting=1, running=0)
    wait_until(lambda: coordinator.board.phase is Phase.RUNNING)
    engines[1].finished()
    engines[1].publish(waiting=0, running=0)
    for engine in engines:
        engine.wave_complete()
    route.done()
    wait_until(lambda: (coordinator.board.wave, coordinator.board.phase) == (wave + 1, Phase.PAUSED))


def stranger(address, keys, kind=zmq.XSUB):
    """A socket of another context with the given keys, or none."""
    s = zmq.Context.instance().socket(kind)
    s.linger = 0
    s.reconnect_ivl = 20
    if keys is not None:
        keys.secure(s)
    s.connect(address)
    return s


def refusals(caplog):
    """What was logged about refused peers."""
    return [r.message for r in caplog.records if r.message.startswith("peer refused: ")]


def test_with_keys_waves_go_round(coordinator, group, folder, using):
    """Guards against keys that keep out those who have them, on any of the three sockets."""
    assert all(a.startswith("tcp:") for a in (coordinator.stats_publish_address, *coordinator.engine_addresses))
    engines = [using(Engine.attach(group, dp_rank, curve_dir=folder)) for dp_rank in (0, 1)]
    frontend = using(Frontend.attach(group, curve_dir=folder))
    for engine in engines:
        wait_until(lambda engine=engine: engine.poll(10) or engine.ready)
    go_round(coordinator, engines, frontend)
    go_round(coordinator, engines, frontend)
    assert coordinator.dropped == {}
    assert coordinator.board.words[coordinator.board.index("starts_sent")] >= 2


def test_keys_by_the_environment(coordinator, group, folder, using, monkeypatch):
    """Guards against tools that cannot be told where the keys are: drain and doctor have no option for it."""
    monkeypatch.setenv("DPSHM_CURVE_DIR", str(folder))
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    set_drained(coordinator.board, [1], True)
    assert coordinator.board.snapshot()["drained"].tolist() == [False, True]
    assert [f for f in check_group(coordinator.board) if f.check == "sockets"] == []
    assert using(Frontend.attach(group)).route().dp_rank == 0
    assert engines[0].dp_rank == 0


def test_without_keys_a_client_is_told_at_once(coordinator, group, folder, using, tmp_path):
    """Guards against silence: a client that could never be heard and does not know it; and rows that it leaves."""
    for attach in (lambda **o: Engine.attach(group, 0, **o), lambda **o: Frontend.attach(group, **o)):
        with pytest.raises(
            SettingError, match=r"only processes that have its keys: give curve_dir=DIR, or set DPSHM_CURVE_DIR"
        ):
            attach()
        with pytest.raises(SettingError, match=r"cannot read the key .*none/server.key: .*dpshm keygen DIR"):
            attach(curve_dir=tmp_path / "none")
        make_keys(tmp_path / "others")
        with pytest.raises(SettingError, match=r"not those of group .* Copy the folder"):
            attach(curve_dir=tmp_path / "others")
        shutil.rmtree(tmp_path / "others")
    wait_until(lambda: coordinator.board.snapshot()["state"].tolist() == ["absent"] * 2)
    assert coordinator.board.frontends_used() == 0
    with pytest.raises(SettingError, match="DPSHM_CURVE_DIR"):
        set_drained(coordinator.board, [1], True)
    (finding,) = [f for f in check_group(coordinator.board) if f.check == "sockets"]
    assert (finding.severity, finding.fix) == ("note", "DPSHM_CURVE_DIR=DIR dpshm doctor")


@pytest.mark.parametrize("case", ["no keys", "another server", "another client"])
@pytest.mark.parametrize("which", ["front-ends", "to engines", "from engines"])
def test_strangers_are_refused_and_logged(coordinator, group, folder, using, tmp_path, caplog, case, which):
    """Guards against a stranger that wakes ranks, ends waves or listens, and against an unlogged refusal."""
    right = client_keys(folder)
    make_keys(tmp_path / "others")
    other = client_keys(tmp_path / "others")
    keys, said = {
        "no keys": (None, "has no keys, or left before it showed them"),
        "another server": (ClientKeys(other.server, right.public, right.secret), "has another server key"),
        "another client": (ClientKeys(right.server, other.public, other.secret), "has a client key that is not"),
    }[case]
    address = dict(
        zip(
            ("front-ends", "to engines", "from engines"),
            (coordinator.stats_publish_address, *coordinator.engine_addresses),
            strict=True,
        )
    )[which]
    with caplog.at_level(logging.WARNING):
        if which == "from engines":
            s = using(stranger(address, keys, zmq.PUSH))
            with suppress(zmq.Again):  # it has no pipe any more once it was refused
                for _ in range(20):
                    s.send(wire.encode_wave_complete(0, 5), zmq.NOBLOCK)
        else:
            s = using(stranger(address, keys))
            s.send(wire.SUBSCRIBE)
            s.send(wire.encode_first_request(0, 0))
        wait_until(lambda: refusals(caplog))
    assert said in refusals(caplog)[0]
    assert address in refusals(caplog)[0]
    assert "DPSHM_CURVE_DIR" in refusals(caplog)[0]
    assert which == "from engines" or not s.poll(200)
    assert coordinator.dropped.keys() == {"peer refused"}
    assert (coordinator.board.wave, coordinator.board.phase) == (0, Phase.PAUSED)
    engines = [using(Engine.attach(group, dp_rank, curve_dir=folder)) for dp_rank in (0, 1)]
    go_round(coordinator, engines, using(Frontend.attach(group, curve_dir=folder)))


def test_refusals_do_not_fill_the_log(coordinator, folder, using, caplog):
    """Guards against a log that misconfigured peers fill, which may try again many times a second."""
    with caplog.at_level(logging.WARNING):
        for _ in range(8):
            using(stranger(coordinator.stats_publish_address, None))
        wait_until(lambda: coordinator.dropped.get("peer refused", 0) >= 8)
    assert len(refusals(caplog)) == 1
    assert coordinator.board.words[coordinator.board.index("messages_dropped")] >= 8


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
"""How a peer without keys begins (ZMTP 3.1, section 3)."""


def test_who_was_refused_is_named(coordinator, folder, using, caplog):
    """Guards against a refusal in the log that does not tell which machine to look at."""
    host, _, port = coordinator.stats_publish_address.removeprefix("tcp://").rpartition(":")
    with caplog.at_level(logging.WARNING), socket.create_connection((host, int(port))) as s:
        name = "{}:{}".format(*s.getsockname())
        wait_until(lambda: s.recv(10))
        accepted = coordinator._wave._sockets.authenticator._peers
        wait_until(lambda: name in list(accepted.values()))  # it has looked who that is, before that one is gone
        s.sendall(GREETING)
        wait_until(lambda: refusals(caplog))
    assert f"peer refused: {name} at " in refusals(caplog)[0]


def test_ipc_needs_no_keys(group, folder, using):
    """Guards against keys asked for where the folder's permissions already tell who may come in."""
    coordinator = using(Coordinator(group=group, dp_size=1, balancing="hybrid", curve_dir=str(folder)))
    assert coordinator.stats_publish_address.startswith("tcp:")
    assert coordinator.engine_addresses[0].startswith("ipc:")
    other = using(Coordinator(group=f"{group}b", dp_size=1, curve_dir=str(folder)))
    using(StockFrontend(other.stats_publish_address)).heard()
    using(Engine.attach(f"{group}b", 0))


def test_keys_that_cannot_be_used(group, folder, tmp_path):
    """Guards against a coordinator that starts without the keys it was told to use, or is left half started."""
    threads, fds = count_threads(), count_fds()
    with pytest.raises(SettingError, match=r"cannot read the key .*server.key_secret: No such file"):
        Coordinator(group=group, dp_size=1, curve_dir=str(tmp_path / "none"), **TCP)
    (folder / "server.key_secret").chmod(0o640)
    with pytest.raises(SettingError, match=r"others may read .* chmod 600"):
        Coordinator(group=group, dp_size=1, curve_dir=str(folder), **TCP)
    wait_until(lambda: count_fds() <= fds)
    assert count_threads() <= threads


def test_a_successor_needs_the_same_keys(group, folder, using, tmp_path):
    """Guards against a live group whose engines and front-ends a new coordinator, without its keys, shuts out."""
    make_keys(tmp_path / "others")
    process = using(CoordinatorProcess(group=group, dp_size=2, curve_dir=str(folder), **TCP))
    engines = [using(Engine.attach(group, dp_rank, curve_dir=folder)) for dp_rank in (0, 1)]
    frontend = using(Frontend.attach(group, curve_dir=folder))
    process.proc.kill()
    process.proc.join()
    for keys in ({}, {"curve_dir": str(tmp_path / "others")}):
        with pytest.raises(
            SettingError, match=r"is alive with the server key .* start it with the group's --curve-dir"
        ):
            Coordinator(group=group, dp_size=2, **TCP, **keys)
    successor = using(Coordinator(group=group, dp_size=2, curve_dir=str(folder), **TCP))
    go_round(successor, engines, frontend)


def test_nothing_is_left_open(group, folder):
    """Guards against contexts, monitors and their descriptors that pile up over coordinators with keys."""

    def cycle():
        with Coordinator(group=group, dp_size=1, curve_dir=str(folder), **TCP) as c:
            stranger(c.stats_publish_address, None).close()
            stranger(c.stats_publish_address, client_keys(folder)).close()

    cycle()
    before, threads = count_fds(), count_threads()
    for _ in range(8):
        cycle()
    wait_until(lambda: count_fds() <= before)
    assert count_threads() <= threads


def test_two_groups_with_keys_in_one_process(group, folder, using):
    """Guards against one authenticator that answers for another group: the address is one a ZMQ context."""
    folders = [folder, folder.with_name("second")]
    make_keys(folders[1])
    for i, keys in enumerate(folders):
        coordinator = using(Coordinator(group=f"{group}{i}", dp_size=1, curve_dir=str(keys), **TCP))
        for other in folders:
            s = using(stranger(coordinator.stats_publish_address, client_keys(other)))
            s.send(wire.SUBSCRIBE)
            assert bool(s.poll(30_000 if other is keys else 300)) is (other is keys)
