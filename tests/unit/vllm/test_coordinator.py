"""Tests of `dpshm.vllm.coordinator`: the handle that vLLM watches, and the way to vLLM's own coordinator."""

from __future__ import annotations

import os
import select
import signal
import sys
from types import ModuleType, SimpleNamespace

import pytest

from dpshm import Board, Engine
from dpshm.board import segment
from dpshm.board.segment import segment_path
from dpshm.coordinator.settings import make_settings
from dpshm.rules.waves import Phase
from dpshm.vllm import coordinator as module
from dpshm.vllm.coordinator import WatchedCoordinator, coordinator_factory
from dpshm.vllm.options import Options
from tests.support import gone, wait_until

STOCK = object()


@pytest.fixture
def watched(group):
    """`watched()` gives a coordinator of two ranks; it ends with the test."""
    made = []

    def start(**settings):
        made.append(WatchedCoordinator(group=group, dp_size=2, **settings))
        return made[-1]

    yield start
    for coordinator in made:
        coordinator.shutdown()


@pytest.fixture
def parallel_config():
    """What the factory reads of vLLM's ``ParallelConfig``, for two ranks on this node."""
    return SimpleNamespace(
        data_parallel_size=2,
        data_parallel_size_local=2,
        data_parallel_master_ip="127.0.0.1",
        data_parallel_external_lb=False,
        data_parallel_hybrid_lb=False,
        enable_elastic_ep=False,
        _api_process_count=2,
    )


@pytest.fixture
def envs(monkeypatch):
    """The module ``vllm.envs`` of this process."""
    envs = ModuleType("vllm.envs")
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    return envs


def ended(proc):
    """Whether a watcher of the process has been told that it ended."""
    return bool(select.select([proc.sentinel], [], [], 0)[0])


@pytest.mark.slow
def test_a_dead_coordinator_comes_back_at_the_same_addresses(group, watched, using):
    """Guards against a server that ends, or a wave that starts from 0, because the coordinator died."""
    coordinator = watched()
    addresses = coordinator.get_stats_publish_address(), *coordinator.get_engine_socket_addresses()
    engine = using(Engine.attach(group, 0))
    engine.receive(None, wave=7)
    with Board.attach(group) as board:
        wait_until(lambda: board.wave == 7 and board.phase is Phase.RUNNING)
        pid = coordinator.proc.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: coordinator.restarts == 1)
        assert coordinator.proc.pid != pid
        assert gone(pid)
        assert coordinator.proc.is_alive()
        assert not ended(coordinator.proc)
        assert board.wave == 7
        assert int(board.epoch[0]) == 2
        assert (coordinator.get_stats_publish_address(), *coordinator.get_engine_socket_addresses()) == addresses


@pytest.mark.slow
def test_when_the_board_died_too_the_watcher_is_told(watched):
    """Guards against a server that goes on with a coordinator which nobody can find."""
    coordinator = watched(balancing="hybrid")  # tcp: the next one has other ports; nobody holds the board
    os.kill(coordinator.proc.pid, signal.SIGKILL)
    wait_until(lambda: ended(coordinator.proc))
    assert coordinator.proc.exitcode not in (None, 0)
    assert not coordinator.proc.is_alive()


@pytest.mark.slow
def test_one_that_keeps_dying_is_given_up(group, watched, using, monkeypatch):
    """Guards against a coordinator that is started for ever."""
    monkeypatch.setattr(module, "MAX_RESTARTS", 1)
    coordinator = watched()
    coordinator._times = type(coordinator._times)(maxlen=1)
    using(Engine.attach(group, 0))
    os.kill(coordinator.proc.pid, signal.SIGKILL)
    wait_until(lambda: coordinator.restarts == 1)
    os.kill(coordinator.proc.pid, signal.SIGKILL)
    wait_until(lambda: ended(coordinator.proc))
    assert coordinator.proc.exitcode == -signal.SIGKILL


def test_shutdown_without_time_still_removes_the_board(group, watched):
    """Guards against a board that outlives the server because vLLM gives its coordinator no time to end."""
    coordinator = watched()
    pid = coordinator.proc.pid
    coordinator.shutdown(timeout=0)
    assert gone(pid)
    assert not segment_path(group).exists()
    assert coordinator.proc.exitcode == 0
    assert ended(coordinator.proc)
    coordinator.proc.join()


def test_the_factory_gives_ours(group, parallel_config, envs, caplog):
    """Guards against settings that do not reach the coordinator, and against a start that nobody sees."""
    caplog.set_level("INFO", logger="vllm.dpshm")
    make = coordinator_factory(lambda *_, **__: STOCK, Options(group=group, stall_timeout_s=7.0))
    coordinator = make(parallel_config, enable_wave_coordination=False, logging_config=None)
    try:
        settings = coordinator.settings
        assert (settings.group, settings.dp_size, settings.waves) == (group, 2, False)
        assert settings.stall_timeout_s == 7.0
        assert coordinator.get_stats_publish_address().startswith("ipc://")
        assert f"coordinates group '{group}': 2 ranks, 2 API servers" in caplog.text
    finally:
        coordinator.shutdown()


@pytest.mark.parametrize(
    ("change", "cause"),
    [("enable_elastic_ep", "elastic"), ("VLLM_USE_RUST_FRONTEND", "Rust front-end")],
)
def test_where_it_cannot_help_it_stays_out(parallel_config, envs, caplog, change, cause):
    """Guards against a coordinator of ours whose board nobody reads."""
    caplog.set_level("INFO", logger="vllm.dpshm")
    setattr(envs if change.startswith("VLLM") else parallel_config, change, True)
    make = coordinator_factory(lambda *_, **__: STOCK, Options())
    assert make(parallel_config, True) is STOCK
    assert cause in caplog.text


@pytest.mark.usefixtures("envs")
def test_a_failure_leaves_vllm_its_own(group, parallel_config, caplog, monkeypatch, tmp_path):
    """Guards against a server that does not start because /dev/shm cannot be used."""
    make = coordinator_factory(lambda *_, **__: STOCK, Options(group=group))
    with monkeypatch.context() as environment:
        environment.setenv("DPSHM_DIR", str(tmp_path / "nowhere"))
        assert make(parallel_config, enable_wave_coordination=True) is STOCK
    assert "vLLM starts its own" in caplog.text
    assert "nowhere" in caplog.text


def test_boards_of_killed_servers_are_removed(monkeypatch, parallel_config, envs, group, using):
    """Guards against a /dev/shm that fills up: the names of killed servers' boards never come again."""
    from tests.support import LoneBoard

    dead = LoneBoard(f"vllm-{group}")
    try:
        coordinator = coordinator_factory(lambda *_, **__: STOCK, Options(group=group))(parallel_config, True)
        coordinator.shutdown()
        assert f"vllm-{group}" not in segment.groups()
    finally:
        dead.segment.unlink()
        dead.close()


def test_a_server_on_a_network_starts_as_it_does_without_us(parallel_config):
    """Guards against a plugin that asks for keys, which no stock engine has: vLLM's coordinator asks for none."""
    parallel_config.data_parallel_master_ip = "10.0.0.1"
    parallel_config.data_parallel_hybrid_lb = True
    given = module._settings(parallel_config, True, Options())
    settings = make_settings(**given)
    assert (settings.host, settings.needs_tcp, settings.curve_dir) == ("10.0.0.1", True, None)
