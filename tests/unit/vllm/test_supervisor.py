"""Tests of `dpshm.vllm.supervisor`: the handle that vLLM watches, and restarts behind it."""

from __future__ import annotations

import os
import select
import signal

import pytest

from dpshm import Board, Engine
from dpshm.board.files import segment_path
from dpshm.rules.waves import Phase
from dpshm.vllm import supervisor
from dpshm.vllm.supervisor import WatchedCoordinator
from tests.support import gone, wait_until


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
def test_a_coordinator_that_is_told_to_end_comes_back(group, watched, using, caplog):
    """Guards against a server that ends because its coordinator alone got a SIGTERM."""
    coordinator = watched()
    engine = using(Engine.attach(group, 0))
    engine.receive(None, wave=7)
    with Board.attach(group) as board:
        wait_until(lambda: board.wave == 7)
        pid = coordinator.proc.pid
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: coordinator.restarts == 1)
        assert coordinator.proc.pid != pid
        assert coordinator.proc.is_alive()
        assert not ended(coordinator.proc)
        assert (board.wave, int(board.epoch[0])) == (7, 2)
    assert "was told to end, and its server was not" in caplog.text


@pytest.mark.parametrize("by", ["shutdown", "terminate"])
def test_a_signal_to_the_whole_server_is_no_error(group, watched, using, monkeypatch, caplog, by):
    """Guards against an error in the log, and a coordinator that comes back, while the server is being stopped."""
    caplog.set_level("DEBUG", logger="vllm.dpshm")
    monkeypatch.setattr(supervisor, "GRACE_S", 60.0)
    coordinator = watched()
    using(Engine.attach(group, 0))  # it ends after its coordinator
    child = coordinator.proc.process.proc
    os.kill(child.pid, signal.SIGTERM)
    wait_until(lambda: "is its server, too?" in caplog.text)
    coordinator.shutdown() if by == "shutdown" else coordinator.proc.terminate()
    coordinator._thread.join()
    assert coordinator.restarts == 0
    assert coordinator.proc.exitcode == 0
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    coordinator.shutdown()
    assert not segment_path(group).exists()


@pytest.mark.slow
def test_when_the_board_died_too_the_watcher_is_told(watched):
    """Guards against a server that goes on with a coordinator which no engine can find."""
    coordinator = watched(balancing="hybrid")  # tcp: the next one has other ports; no process keeps the board
    os.kill(coordinator.proc.pid, signal.SIGKILL)
    wait_until(lambda: ended(coordinator.proc))
    assert coordinator.proc.exitcode not in (None, 0)
    assert not coordinator.proc.is_alive()


@pytest.mark.slow
def test_one_that_keeps_dying_is_given_up(group, watched, using, monkeypatch):
    """Guards against a coordinator that is started for ever."""
    monkeypatch.setattr(supervisor, "MAX_RESTARTS", 1)
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
