"""Two servers on one node at once: one is started again on its port, the other's launcher is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from dpshm.rules.waves import Phase
from tests.e2e.vllm import checks, environment
from tests.e2e.vllm.server import NO_MODEL, Server
from tests.support import gone, wait_until

RANKS = 2
ARGUMENTS = ("--data-parallel-size", str(RANKS), "--api-server-count", "2", *NO_MODEL)
GROUP = "vllm-test-again"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a server; it ends with the module."""
    started = []

    def one(model, **named):
        started.append(Server(tmp_path_factory.mktemp("vllm"), model, *ARGUMENTS, **named))
        return started[-1]

    yield one
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def servers(start):
    """One of dense ranks, under a name of its own, and one in lockstep; they start at the same time."""
    both = start("dense", DPSHM_GROUP=GROUP), start("moe")
    for server in both:
        server.wait_ready()
    return both


def test_two_servers_on_a_node_keep_apart(servers):
    """Guards against engines or API servers that find the board of another server."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(checks.answers_a_burst, servers))
    for server in servers:
        assert server.log.count(f"to the board of group '{server.group}'") == RANKS
        assert server.log.count(f"chooses by the board, group '{server.group}'") == 2
        checks.board_agrees_with_vllm(server)
        with server.board() as board:
            assert board.requests_finished[:RANKS].sum() == len(checks.BURST)
    told = subprocess.run(
        [sys.executable, "-m", "dpshm", "ls"], capture_output=True, text=True, cwd=environment.ROOT, check=True
    ).stdout
    assert all(server.group in told for server in servers), told


def test_a_server_is_started_again_on_its_port_right_after_its_end(servers, start):
    """Guards against a board, a lock or an address of the last server that keeps the next from starting."""
    first, other = servers
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(first.try_to_generate, [5, 6, 7], 1500) for _ in range(8)]
        with first.board() as board:
            wait_until(lambda: board.snapshot()["running"].sum() == 8)
        first.terminate()
        again = start("dense", port=first.port, DPSHM_GROUP=GROUP)
        assert [future.exception(60) or future.result()[0] for future in running]  # over, one way or the other
    again.wait_ready()
    checks.answers_a_burst(again)
    checks.board_agrees_with_vllm(again)
    assert again.log.count(f"coordinates group '{GROUP}'") == 1
    checks.answers_a_burst(other)
    again.stop()
    assert again.left() == []


def test_a_lockstep_server_goes_on_without_its_launcher(servers):
    """Guards against ranks that no coordinator wakes, and requests that hang, once the launcher was killed.

    The last test: it ends the server.
    """
    server = servers[1]
    with server.board() as board:
        coordinator = int(board.coordinator_pid[0])
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: server.pid not in server.processes())
        for rank in range(RANKS):  # each finds all ranks asleep
            wait_until(lambda: checks.is_idle(board) and board.phase is Phase.PAUSED)
            wave = board.wave
            assert len(server.generate(3, 8, rank)) == 8
            wait_until(lambda wave=wave: board.wave > wave)
        checks.answers_a_burst(server)
        assert int(board.coordinator_pid[0]) == coordinator
    server.kill(but=coordinator)
    wait_until(lambda: gone(coordinator))
    assert server.left() == []
