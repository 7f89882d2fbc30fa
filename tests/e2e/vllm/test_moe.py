"""Four lockstep ranks behind two API servers: real waves, bookings and failures; only the model sleeps."""

from __future__ import annotations

import os
import signal
import time

import pytest
import zmq

from dpshm import wire
from dpshm.waves import Phase
from tests.e2e.vllm import checks
from tests.e2e.vllm.server import NO_MODEL
from tests.support import gone, wait_until

RANKS = 4


@pytest.fixture(scope="module")
def server(serve):
    """The server of this module."""
    return serve("moe", "--data-parallel-size", str(RANKS), "--api-server-count", "2", *NO_MODEL)


@pytest.fixture
def board(server):
    """Its board, with all ranks idle and paused."""
    with server.board() as board:
        wait_until(lambda: checks.is_idle(board) and board.phase is Phase.PAUSED)
        yield board


def test_requests_are_answered_and_the_board_agrees(server):
    """Guards against requests lost or cut short, and against a board that tells another story than vLLM."""
    assert "waves on" in server.log
    checks.answers_a_burst(server)
    checks.board_agrees_with_vllm(server)


def test_api_servers_see_each_others_bookings(server, board):
    """Guards against API servers that each spread what they send evenly, and together do not."""
    before = board.sent_requests[:2, :RANKS].copy()
    # Nothing finishes while they are being sent, so every decision sees all those before it.
    server.generate_all([(3, 600)] * 64, threads=64)
    sent = board.sent_requests[:2, :RANKS] - before
    assert (sent.sum(axis=1) > 0).all(), "one API server got all connections"
    by_rank = sent.sum(axis=0)
    assert by_rank.sum() == 64
    assert by_rank.max() - by_rank.min() <= 2, sent


def test_a_request_wakes_all_ranks_and_they_pause_together(server, board):
    """Guards against ranks that stay awake, that stay asleep, or that count their waves apart."""
    for _ in range(5):
        wave, steps = board.wave, board.steps[:RANKS].tolist()
        assert len(server.generate(5, 10)) == 10
        wait_until(lambda w=wave: checks.is_idle(board) and board.phase is Phase.PAUSED and board.wave > w)
        assert (board.snapshot()["wave"] == board.wave).all()
        assert all(after - before >= 10 for before, after in zip(steps, board.steps[:RANKS].tolist(), strict=True))


def test_a_request_is_one_wave_or_two(server, board):
    """Guards against wake-ups for work that is over, which make all ranks step for nothing.

    A notice that comes when its wave is over already wakes the ranks once more: so two, and no more.
    """
    wave = board.wave
    for _ in range(10):
        server.generate(3, 3)
        wait_until(lambda: checks.is_idle(board) and board.phase is Phase.PAUSED)
    assert wave + 10 <= board.wave <= wave + 20


def test_a_stale_notice_turns_nothing_back(server, board):
    """Guards against an API server that slept through some waves and stops the ranks, or the wave's growth."""
    wave = board.wave
    assert wave > 0
    with zmq.Context() as context, context.socket(zmq.XSUB) as notice:
        notice.connect(board.segment.header.stats_address)
        notice.send(wire.encode_first_request(0, 0))
        wait_until(lambda: board.wave == wave + 1 and board.phase is Phase.PAUSED and checks.is_idle(board))
    assert len(server.generate(3, 4)) == 4


def test_pause_and_resume(server, board):
    """Guards against ranks that a wake-up starts while the user has paused them, or that never start again."""
    if server.request("GET", "/is_paused")[0] == 404:
        pytest.skip("this server has no /pause")
    assert server.request("POST", "/pause?mode=keep")[0] == 200
    wait_until(lambda: set(board.snapshot()["state"].tolist()) == {"paused"})
    steps = board.steps[:RANKS].tolist()
    with zmq.Context() as context, context.socket(zmq.XSUB) as notice:
        notice.connect(board.segment.header.stats_address)
        notice.send(wire.encode_first_request(None, board.wave))
        wait_until(lambda: board.phase is Phase.WAKING)
    time.sleep(0.5)  # START is repeated meanwhile
    assert board.steps[:RANKS].tolist() == steps
    assert server.request("POST", "/resume")[0] == 200
    assert len(server.generate(3, 4)) == 4


def test_the_boards_figures_are_on_vllms_metrics_page(server, board):
    """Guards against figures that need a second port, which nobody scrapes."""
    for name in ("unseen_requests", "prefill_backlog_tokens", "stats_age_seconds"):
        values = server.metric(f"dpshm_rank_{name}", label="dp_rank", group=server.group)
        assert sorted(values) == list(range(RANKS)), name


def test_an_aborted_request_leaves_the_books(server, board):
    """Guards against bookings that outlive a client which went away."""
    import http.client
    import json

    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = {"token_ids": [5] * 9, "sampling_params": {"max_tokens": 1900, "ignore_eos": True, "detokenize": False}}
    connection.request("POST", "/inference/v1/generate", json.dumps(body), {"content-type": "application/json"})
    wait_until(lambda: board.snapshot()["running"].sum() == 1)
    connection.close()
    wait_until(lambda: checks.is_idle(board) and board.phase is Phase.PAUSED)
    assert (board.sent_requests[:, :RANKS] == board.received_requests[:RANKS, :].T).all()


def test_a_dead_coordinator_is_started_again(server, board):
    """Guards against a server that ends, or ranks that never wake again, because the coordinator died."""
    wave, pid = board.wave, int(board.coordinator_pid[0])
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: gone(pid))
    assert len(server.generate(3, 4)) == 4  # nobody else can wake the ranks: it waits for the new one
    wait_until(lambda: int(board.coordinator_pid[0]) != pid and board.coordinator_alive())
    assert int(board.epoch[0]) == 2
    assert board.wave >= wave
    checks.answers_a_burst(server)
    wait_until(lambda: "coordinator is back" in server.log)


def test_nothing_is_left_behind(server):
    """Guards against processes and memory that outlive the server. The last test of this module: it ends it."""
    assert len(server.processes()) > RANKS
    assert server.left()
    server.stop()
    assert server.processes() == {}
    assert server.left() == []
