"""A real dense model on the CPU with two ranks and two API servers, with dpshm installed and no other change."""

from __future__ import annotations

import os
import signal

import pytest

from tests.e2e.vllm import checks, environment
from tests.e2e.vllm.server import NO_MODEL
from tests.support import gone, wait_until

RANKS = 2


@pytest.fixture(scope="module")
def server(serve):
    """The server of this module: a real model, where that runs."""
    model = [] if environment.computes() else NO_MODEL
    return serve("dense", "--data-parallel-size", str(RANKS), "--api-server-count", "2", *model)


def test_the_log_says_that_dpshm_is_active(server):
    """Guards against a log that does not say whether the plugin works."""
    assert server.log.count(f"coordinates group '{server.group}': {RANKS} ranks, 2 API servers") == 1
    assert server.log.count("publishes to the board") == RANKS
    assert server.log.count("chooses by the board") == 2


def test_requests_are_answered_and_the_board_agrees(server):
    """Guards against requests lost or cut short, and against a board that tells another story than vLLM."""
    checks.answers_a_burst(server)
    checks.board_agrees_with_vllm(server)


def test_the_coordinator_is_small(server):
    """Guards against a coordinator that imports the server again: half a gigabyte and seconds of start."""
    with server.board() as board, open(f"/proc/{int(board.coordinator_pid[0])}/statm") as f:
        resident_mb = int(f.read().split()[1]) * 4096 / 1e6
    assert resident_mb < 100


def test_a_launcher_that_is_killed_leaves_nothing_of_ours(server):
    """Guards against requests that hang once the launcher is gone, and a coordinator that outlives its group.

    The last test: it ends the server.
    """
    with server.board() as board:
        coordinator = int(board.coordinator_pid[0])
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: server.pid not in server.processes())
    assert server.generate_all([(3, 8)] * 8) == [8] * 8
    assert not gone(coordinator)
    server.kill(but=coordinator)
    wait_until(lambda: gone(coordinator))
    assert server.left() == []
