"""External load balancing: each rank has a launcher, a gateway chooses; dpshm gives the waves and the figures."""

from __future__ import annotations

import pytest

from dpshm.rules.waves import Phase
from tests.e2e.vllm import checks
from tests.e2e.vllm.server import NO_MODEL, Server, free_port
from tests.support import wait_until


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """One server a rank, the one with the coordinator first."""
    common = ["--data-parallel-size", "2", "--data-parallel-address", "127.0.0.1"]
    common += ["--data-parallel-rpc-port", str(free_port()), *NO_MODEL]
    started = [
        Server(tmp_path_factory.mktemp("vllm"), "moe", *common, "--data-parallel-rank", rank)
        for rank in ("0", "1")
    ]
    try:
        for server in started:
            server.wait_ready()
        yield started
    finally:
        for server in reversed(started):
            server.stop()


def test_each_rank_serves_its_own_and_all_wake_together(servers):
    """Guards against ranks that sleep while another has work, and against a board that external ranks miss."""
    first, second = servers
    assert f"coordinates group '{first.group}': 2 ranks, 1 API servers, external load balancing" in first.log
    with first.board() as board:
        for server, rank in ((first, 0), (second, 1)):
            assert f"to the board of group '{first.group}'" in server.log
            assert "reads the wave from the board" in server.log
            wave, finished = board.wave, board.requests_finished[:2].copy()
            checks.answers_a_burst(server)
            wait_until(lambda: checks.is_idle(board) and board.phase is Phase.PAUSED)
            assert board.wave > wave
            assert (board.requests_finished[:2] - finished)[rank] == len(checks.BURST)
        assert (board.snapshot()["wave"] == board.wave).all()
