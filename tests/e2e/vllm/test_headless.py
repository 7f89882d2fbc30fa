"""A second launcher without API servers (``--headless``) on one node: its ranks are on the first one's board."""

from __future__ import annotations

import pytest

from tests.e2e.vllm import checks
from tests.e2e.vllm.server import NO_MODEL, Server, free_port
from tests.support import wait_until

RANKS = 4


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """The launcher with the API servers, and the headless one."""
    common = ["--data-parallel-size", str(RANKS), "--data-parallel-size-local", "2", *NO_MODEL]
    common += ["--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(free_port())]
    own = (["--api-server-count", "2"], ["--headless", "--data-parallel-start-rank", "2"])
    started = [Server(tmp_path_factory.mktemp("vllm"), "dense", *common, *arguments) for arguments in own]
    try:
        started[0].wait_ready()
        yield started
    finally:
        for server in started:
            server.stop()


def test_the_ranks_of_both_launchers_are_on_one_board(servers):
    """Guards against ranks of a second launcher that are not chosen, or of which only reports are known."""
    first, second = servers
    for server in servers:
        assert server.log.count(f"to the board of group '{first.group}'") == 2
    checks.answers_a_burst(first)
    with first.board() as board:
        wait_until(lambda: checks.is_idle(board))
        finished = board.requests_finished[:RANKS]
        assert finished.sum() == len(checks.BURST)
        assert finished.min() > 0
        assert not board.snapshot()["stock"].any()
    assert "coordinates group" not in second.log
    checks.board_agrees_with_vllm(first)
