"""Hybrid load balancing: two launchers, each with two ranks and two API servers of its own, one board.

Both launchers number their API servers from 0, and the second one's processes know nothing of the first one's
environment: they find the board by the address of the stats socket.
"""

from __future__ import annotations

import pytest

from dpshm.rules.waves import Phase
from tests.e2e.vllm import checks
from tests.e2e.vllm.server import NO_MODEL, Server, free_port
from tests.support import wait_until


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """The two, the one with the coordinator first."""
    common = ["--data-parallel-size", "4", "--data-parallel-size-local", "2", "--data-parallel-hybrid-lb"]
    common += ["--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(free_port()), *NO_MODEL]
    started = [
        Server(tmp_path_factory.mktemp("vllm"), "moe", *common, "--data-parallel-start-rank", first)
        for first in ("0", "2")
    ]
    try:
        for server in started:
            server.wait_ready()
        yield started
    finally:
        for server in reversed(started):
            server.stop()


def test_both_nodes_use_one_board_and_their_own_ranks(servers):
    """Guards against API servers of one launcher that take the other's rows, or choose the other's ranks."""
    first, second = servers
    assert f"coordinates group '{first.group}': 4 ranks" in first.log
    for server in servers:
        assert server.log.count(f"to the board of group '{first.group}'") == 2
        assert server.log.count("chooses by the board") == 2
    with first.board() as board:
        for server, ranks in ((first, (0, 1)), (second, (2, 3))):
            before = board.requests_finished[:4].copy()
            checks.answers_a_burst(server)
            wait_until(lambda: checks.is_idle(board) and board.phase is Phase.PAUSED)
            finished = board.requests_finished[:4] - before
            assert finished[list(ranks)].sum() == finished.sum() == len(checks.BURST)
        assert (board.sent_requests[:4, :4] == board.received_requests[:4, :4].T).all()
        assert (board.snapshot()["wave"] == board.wave).all()
