"""Tests of `dpshm.vllm.revival`: real engine processes die, and a launcher of vLLM's shape keeps the server up."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest

from dpshm import Board, Frontend
from dpshm.vllm import revival
from dpshm.vllm.find import owner_name
from dpshm.vllm.options import Options
from dpshm.vllm.revival import KEEPER, Keeper, made_manager, monitored, waited_for_startup
from dpshm.vllm.supervisor import WatchedCoordinator
from tests.support import wait_until
from tests.unit.vllm import fake_launch

RANKS = 2


class Launcher:
    """A launcher with its engines, and the thread in which vLLM watches them."""

    def __init__(self, group, coordinator, short_path, **options):
        manager_of, utils = fake_launch.CoreEngineProcManager, sys.modules["vllm.v1.engine.utils"]
        kind = type("CoreEngineProcManager", (manager_of,), {})
        kind.__init__ = made_manager(manager_of.__init__)
        kind.monitor_engine_liveness = monitored(manager_of.monitor_engine_liveness)
        utils.CoreEngineProcManager = kind
        self.config = fake_launch.Config(group)
        self.manager = kind(
            local_engine_count=RANKS,
            start_index=0,
            local_start_index=0,
            vllm_config=self.config,
            local_client=True,
            handshake_address=None,
        )
        addresses = fake_launch.Addresses([f"ipc://{short_path}/in"])
        launch = SimpleNamespace(engine_manager=self.manager, coordinator=coordinator, addresses=addresses)
        waited_for_startup(lambda launch: None, Options(**options))(launch=launch)
        self.thread = threading.Thread(target=self.manager.monitor_engine_liveness)
        self.thread.start()

    def close(self):
        """Ends all."""
        self.manager.shutdown()
        self.thread.join()


@pytest.fixture(autouse=True)
def _vllm(monkeypatch, short_path):
    utils = ModuleType("vllm.v1.engine.utils")
    utils.EngineHandshakeMetadata = fake_launch.EngineHandshakeMetadata
    utils.get_mp_context = fake_launch.get_mp_context
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.utils", utils)
    network, system = ModuleType("vllm.utils.network_utils"), ModuleType("vllm.utils.system_utils")
    network.get_open_zmq_ipc_path = lambda: f"ipc://{short_path}/handshake"
    system.get_mp_context = lambda: SimpleNamespace(get_start_method=lambda: "spawn")
    monkeypatch.setitem(sys.modules, "vllm.utils.network_utils", network)
    monkeypatch.setitem(sys.modules, "vllm.utils.system_utils", system)


@pytest.fixture
def launch(group, short_path):
    """`launch()` gives a launcher whose engines are there, and the board."""
    made = []

    def start(waves=False, api_servers=1, **options):
        coordinator = WatchedCoordinator(group=group, dp_size=RANKS, waves=waves)
        made.append(coordinator.shutdown)
        launcher = Launcher(group, coordinator, short_path, **options)
        made.append(launcher.close)
        board = Board.attach(group)
        made.append(board.close)
        for i in range(api_servers):
            made.append(Frontend.attach(group, owner=owner_name(i, f"ipc://{short_path}/in")).close)
        wait_until(lambda: min(board.engine_incarnation[:RANKS]) > 0)
        return launcher, board

    yield start
    for close in reversed(made):
        close()


def test_a_rank_that_dies_is_started_again(launch, log, short_path):
    """Guards against a server that ends for one rank, and a rank that starts with a changed configuration."""
    launcher, board = launch()
    other, pid = int(board.engine_pid[0]), int(board.engine_pid[1])
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: log("rank 1 is back"))
    again = int(board.engine_pid[1])
    assert again not in (0, pid)
    assert [p.pid for p in launcher.manager.processes] == [other, again]
    assert not launcher.manager.manager_stopped.is_set()
    assert launcher.manager.failed_proc_name is None
    os.kill(again, signal.SIGKILL)  # and once more
    wait_until(lambda: log("rank 1 is back") == 2)
    assert os.listdir(short_path) == []


def test_a_server_that_ends_ends_the_process_that_came_later(launch, log):
    """Guards against a process that was started again and outlives its server."""
    launcher, board = launch()
    os.kill(int(board.engine_pid[1]), signal.SIGKILL)
    wait_until(lambda: log("rank 1 is back"))
    launcher.close()
    assert all(process.exitcode is not None for process in launcher.manager.processes)


def test_a_rank_that_does_not_start_stays_away_and_the_last_one_ends_the_server(launch, log, monkeypatch):
    """Guards against a rank that is started for ever, and a server that stays up without any rank."""
    monkeypatch.setattr(revival, "PAUSE_S", 0.001)
    launcher, board = launch()
    vars(launcher.manager)[KEEPER]._arguments["vllm_config"].fails = True
    os.kill(int(board.engine_pid[1]), signal.SIGKILL)
    wait_until(lambda: log("rank 1 died 6 times"))
    assert log("rank 1 did not start again") == 5
    assert not launcher.manager.manager_stopped.is_set()
    os.kill(int(board.engine_pid[0]), signal.SIGKILL)
    launcher.thread.join(60)
    assert launcher.manager.manager_stopped.is_set()
    assert launcher.manager.failed_proc_name is not None


@pytest.mark.parametrize(
    ("started", "options", "why"),
    [
        ({"waves": True}, {}, "ranks in lockstep cannot go on without each other"),
        ({}, {"restart": False}, "DPSHM_RESTART is 0"),
        ({}, {"mode": "shadow"}, "vLLM chooses"),
        ({"api_servers": 0}, {}, "of 1 API servers 0 choose by the board"),
    ],
)
def test_where_a_rank_is_needed_the_server_ends_and_says_why(launch, log, started, options, why):
    """Guards against ranks in lockstep that wait for one that is gone, and API servers that do not notice."""
    launcher, board = launch(**started, **options)
    assert isinstance(vars(launcher.manager)[KEEPER], Keeper) == ("api_servers" in started)
    os.kill(int(board.engine_pid[1]), signal.SIGKILL)
    launcher.thread.join(60)
    assert launcher.manager.failed_proc_name == "EngineCore_DP1"
    assert log(why) == 1


def test_a_rank_that_ends_in_good_order_ends_the_server(launch, log):
    """Guards against ranks that are started again while their server ends: all got the same signal."""
    launcher, board = launch()
    os.kill(int(board.engine_pid[1]), signal.SIGTERM)
    launcher.thread.join(60)
    assert launcher.manager.manager_stopped.is_set()
    assert launcher.manager.failed_proc_name is None
    assert log("it ended in good order") == 1
