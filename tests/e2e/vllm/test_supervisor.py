"""vLLM's supervisor: one API server for each rank, each on a port of its own, behind a gateway outside."""

from __future__ import annotations

import http.client
from http import HTTPStatus

import pytest

from dpshm.board import files
from dpshm.board.board import Board
from dpshm.rules.waves import Phase
from tests.e2e.vllm import checks, environment
from tests.e2e.vllm.server import NO_MODEL, Server, free_port
from tests.support import wait_until

RANKS = 2
SUPERVISED_SINCE = (0, 32)

pytestmark = pytest.mark.skipif(
    environment.why_not() is None and environment.installed() < SUPERVISED_SINCE,
    reason="no supervisor in this release",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The supervisor, once all its servers answer. Its ranks are in lockstep."""
    supervised = ["--data-parallel-multi-port-external-lb", "--data-parallel-size-local", str(RANKS)]
    supervised += ["--data-parallel-size", str(RANKS), "--data-parallel-supervisor-port", str(free_port())]
    supervised += ["--data-parallel-rpc-port", str(free_port()), "--data-parallel-address", "127.0.0.1"]
    started = Server(tmp_path_factory.mktemp("vllm"), "moe", *supervised, *NO_MODEL)
    try:
        started.wait_ready()
        of_rank(started, 1, lambda server: wait_until(lambda: answers(server), 300.0))
        yield started
    finally:
        started.stop()


def answers(server):
    """Whether the server of one rank does."""
    try:
        return server.request("GET", "/health")[0] == HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False


def of_rank(server, rank, use):
    """Uses the server at the port of a rank."""
    first = server.port
    server.port = first + rank
    try:
        return use(server)
    finally:
        server.port = first


def test_each_rank_publishes_and_the_gateway_chooses(server):
    """Guards against ranks that are not on the board, or that sleep while another has work."""
    (group,) = {g for g in files.groups() if f"coordinates group '{g}'" in server.log}
    assert f"coordinates group '{group}': {RANKS} ranks, 1 API servers, external load balancing" in server.log
    assert server.log.count(f"to the board of group '{group}'") == RANKS
    assert server.log.count("reads the wave from the board") == RANKS
    with Board.attach(group) as board:
        for rank in range(RANKS):
            before = board.requests_finished[:RANKS].copy()
            of_rank(server, rank, checks.answers_a_burst)
            wait_until(lambda: checks.is_idle(board) and board.phase is Phase.PAUSED)
            finished = (board.requests_finished[:RANKS] - before).tolist()
            assert finished == [len(checks.BURST) if r == rank else 0 for r in range(RANKS)]
            metrics = of_rank(server, rank, lambda s: s.request("GET", "/metrics")[1])
            assert all(f'dpshm_rank_state{{dp_rank="{r}",group="{group}"' in metrics for r in range(RANKS))
    server.stop()
    assert group not in files.groups()
