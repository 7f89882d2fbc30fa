"""Four lockstep ranks behind two API servers: real waves, bookings and failures; only the model sleeps."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmq

from dpshm.board import files
from dpshm.net import wire
from dpshm.rules.waves import Phase
from tests.e2e.vllm import checks, environment
from tests.e2e.vllm.server import executor
from tests.support import gone, wait_until

RANKS = 4
REFUSED = 13  # see `refusing_executor`, which cannot be imported here: it needs vLLM
TOO_LONG = 3000
NOT_ENCODABLE = {"extra_args": {"more than msgpack's integers hold": 1 << 70}}


@pytest.fixture(scope="module")
def dead_group():
    """A group whose processes were killed all at once, under a name as a server's."""
    return checks.killed_group(f"vllm-test{os.getpid()}")


@pytest.fixture(scope="module")
def server(serve, dead_group):
    """The server of this module. It chooses by counts, so that a test knows how many requests each rank gets."""
    refusing = executor("tests.e2e.vllm.refusing_executor.RefusingExecutor")
    ranks = ("--data-parallel-size", str(RANKS), "--api-server-count", "2")
    return serve("moe", *ranks, *refusing, DPSHM_POLICY="least_loaded")


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


def test_what_killed_groups_left_is_swept_at_the_start(server, dead_group):
    """Guards against memory that piles up: each killed server leaves a board that no other program removes."""
    assert dead_group not in files.groups()


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


def test_a_request_is_one_wave(server, board):
    """Guards against waves in which all ranks step for nothing: wake-ups ahead of their requests, or behind them.

    Ranks that wake up before the request has come go back to sleep at their first step, and a notice that comes
    when its wave is over wakes them once more. Either may happen on a busy machine, so there are three attempts.
    """
    waves = []
    while len(waves) < 3 and 10 not in waves:
        wave = board.wave
        for _ in range(10):
            server.generate(3, 64)
            wait_until(lambda: checks.is_idle(board) and board.phase is Phase.PAUSED)
        waves.append(board.wave - wave)
    assert waves[-1] == 10, waves


def test_a_pinned_request_goes_where_it_must_and_is_booked(server, board):
    """Guards against a rank named by a gateway that the board's choice overrides, or that is not counted."""
    sent, finished = board.sent_requests[:, :RANKS].sum(axis=0), board.requests_finished[:RANKS].copy()
    per_rank = [3, 1, 2, 4]
    sizes = [(3, 8, rank) for rank, n in enumerate(per_rank) for _ in range(n)]
    assert server.generate_all(sizes) == [8] * len(sizes)
    wait_until(lambda: checks.is_idle(board))
    assert (board.sent_requests[:, :RANKS].sum(axis=0) - sent).tolist() == per_rank
    assert (board.requests_finished[:RANKS] - finished).tolist() == per_rank


def test_who_may_choose_avoids_a_rank_that_pinned_requests_fill(server, board):
    """Guards against pinned requests that the other API server's decisions do not see."""
    sent = board.sent_requests[:, :RANKS].sum(axis=0)
    # Nothing finishes while they are being sent: 12 at rank 2, then 12 for the other three to share.
    with ThreadPoolExecutor(1) as pool:
        pinned = pool.submit(server.generate_all, [(3, 900, 2)] * 12)
        wait_until(lambda: board.snapshot()["running"][2] == 12)
        assert server.generate_all([(3, 300)] * 12) == [300] * 12
        assert pinned.result() == [900] * 12
    by_rank = (board.sent_requests[:, :RANKS].sum(axis=0) - sent).tolist()
    assert by_rank.pop(2) == 12
    assert sum(by_rank) == 12
    assert max(by_rank) - min(by_rank) <= 2, by_rank


@pytest.mark.parametrize(
    ("prompt", "options", "received"),
    [
        pytest.param([5] * TOO_LONG, {}, 0, id="too long: by the API server"),
        pytest.param([5, 6], {"dp_rank": 77}, 0, id="pinned to a rank that is not there: by the API server"),
        pytest.param([5, 6], NOT_ENCODABLE, 0, id="not encodable: booked, and not sent"),
        pytest.param([REFUSED, 6], {}, 1, id="by the engine"),
    ],
)
def test_a_refused_request_leaves_no_booking_and_hangs_nobody(server, board, prompt, options, received):
    """Guards against a refusal that leaves a rank asleep or alone in a collective, or a booking that stays."""
    before = int(board.received_requests[:RANKS].sum())
    status, text = server.try_to_generate(prompt, **options)
    assert 400 <= status < 600 or '"finish_reason":"error"' in text, text  # so says 0.28
    wait_until(lambda: int(board.received_requests[:RANKS].sum()) == before + received)
    # The answer may be here before the engine's busy loop has counted: what is outstanding is right all the same.
    wait_until(lambda: checks.is_idle(board) and board.phase is Phase.PAUSED)
    assert server.generate_all([(3, 4)] * 8) == [4] * 8


def test_a_stale_notice_turns_nothing_back(server, board):
    """Guards against an API server that slept through some waves and stops the ranks, or the wave's growth."""
    wave, heard = board.wave, int(board.messages_received[0])
    assert wave > 0
    with zmq.Context() as context, context.socket(zmq.XSUB) as notice:
        notice.connect(board.segment.header.stats_address)
        notice.send(wire.encode_first_request(0, 0))
        wait_until(lambda: board.messages_received[0] > heard)
    assert (board.wave, board.phase) == (wave, Phase.PAUSED)  # a request would wake the ranks: here is none
    assert len(server.generate(3, 4)) == 4
    wait_until(lambda: board.wave == wave + 1 and board.phase is Phase.PAUSED and checks.is_idle(board))


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


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake_up(server, board, level):
    """Guards against lockstep ranks that sleep and are not woken together, and a request that waits for one."""
    assert server.request("POST", f"/sleep?level={level}")[0] == 200
    wait_until(lambda: set(board.snapshot()["state"].tolist()) == {"paused"})
    assert server.request("POST", "/wake_up")[0] == 200
    assert server.generate_all([(3, 4)] * 8) == [4] * 8


def test_the_boards_figures_are_on_vllms_metrics_page(server, board):
    """Guards against figures that need a second port."""
    for name in ("in_flight_requests", "prefill_backlog_tokens", "stats_age_seconds"):
        values = server.metric(f"dpshm_rank_{name}", label="dp_rank", group=server.group)
        assert sorted(values) == list(range(RANKS)), name


def test_an_aborted_request_leaves_the_books(server, board):
    """Guards against bookings that outlive a client which went away."""
    import http.client
    import json

    received = int(board.received_requests[:RANKS].sum())
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = {"token_ids": [5] * 9, "sampling_params": {"max_tokens": 1900, "ignore_eos": True, "detokenize": False}}
    connection.request("POST", "/inference/v1/generate", json.dumps(body), {"content-type": "application/json"})
    wait_until(lambda: board.snapshot()["running"].sum() == 1)
    connection.close()
    wait_until(lambda: checks.is_idle(board) and board.phase is Phase.PAUSED)
    assert int(board.received_requests[:RANKS].sum()) == received + 1


def test_a_dead_coordinator_is_started_again(server, board):
    """Guards against a server that ends, or ranks that never wake again, because the coordinator died."""
    wave, pid = board.wave, int(board.coordinator_pid[0])
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: gone(pid))
    assert (
        len(server.generate(3, 4)) == 4
    )  # no other process can wake the ranks: the request waits for the new coordinator
    wait_until(lambda: int(board.coordinator_pid[0]) != pid and board.coordinator_alive())
    assert int(board.epoch[0]) == 2
    assert board.wave >= wave
    checks.answers_a_burst(server)
    wait_until(lambda: "coordinator is back" in server.log)


def test_a_coordinator_that_is_told_to_end_is_started_again(server, board):
    """Guards against a server that ends because its coordinator alone got a SIGTERM."""
    wave, epoch, pid = board.wave, int(board.epoch[0]), int(board.coordinator_pid[0])
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: gone(pid))
    assert len(server.generate(3, 4)) == 4
    wait_until(lambda: int(board.coordinator_pid[0]) != pid and board.coordinator_alive())
    assert int(board.epoch[0]) == epoch + 1
    assert board.wave >= wave
    checks.answers_a_burst(server)


def test_a_stopped_coordinator_leaves_no_rank_asleep(server, board):
    """Guards against a request that waits for a coordinator which is stopped: a rank wakes the others itself."""
    pid = int(board.coordinator_pid[0])
    os.kill(pid, signal.SIGSTOP)
    try:
        for rank in range(RANKS):  # each finds all ranks asleep
            assert len(server.generate(3, 4, rank)) == 4
            wait_until(lambda: checks.is_idle(board))
        checks.answers_a_burst(server)
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: checks.is_idle(board) and board.phase is Phase.PAUSED)
    checks.answers_a_burst(server)


def test_a_paused_engine_that_rejects_requests_leaves_the_books_at_zero(server, board):
    """Guards against a booking, or a receipt without one, of a request that a paused engine answers."""
    if environment.installed() < (0, 33):
        pytest.skip("before 0.33 a paused engine queues requests")
    before = int(board.received_requests[:RANKS].sum())
    assert server.request("POST", "/pause?mode=abort")[0] == 200
    try:
        for rank in range(RANKS):
            status, text = server.try_to_generate([5, 6], dp_rank=rank)
            assert status != 200 or '"finish_reason":"error"' in text, text
    finally:
        assert server.request("POST", "/resume")[0] == 200
    wait_until(lambda: int(board.received_requests[:RANKS].sum()) == before + RANKS)
    wait_until(lambda: checks.is_idle(board) and board.phase is Phase.PAUSED)
    assert (board.sent_requests[:, :RANKS] == board.received_requests[:RANKS].T).all()
    assert server.generate_all([(3, 4)] * 8) == [4] * 8


def test_nothing_is_left_behind(server):
    """Guards against processes and memory that outlive the server. The last test of this module: it ends it."""
    assert len(server.processes()) > RANKS
    assert server.left()
    server.stop()
    assert server.processes() == {}
    assert server.left() == []
