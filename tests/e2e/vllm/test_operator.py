"""What an operator does to a running server, with one API server and asynchronous scheduling."""

from __future__ import annotations

import http.client
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.vllm import checks, environment
from tests.e2e.vllm.server import NO_MODEL
from tests.support import wait_until

RANKS = 2
ARGUMENTS = ("dense", "--data-parallel-size", str(RANKS), "--api-server-count", "1")


@pytest.fixture(scope="module")
def server(serve):
    """The server of this module: a real model with asynchronous scheduling, where that runs."""
    return serve(*ARGUMENTS, *(["--async-scheduling"] if environment.computes() else NO_MODEL))


@pytest.fixture
def board(server):
    """Its board, with all ranks idle."""
    with server.board() as board:
        wait_until(lambda: checks.is_idle(board), 20.0)
        yield board


def test_requests_are_answered_and_the_board_agrees(server):
    """Guards against a single API server, or steps that overlap, that make the board tell another story."""
    checks.answers_a_burst(server)
    checks.board_agrees_with_vllm(server)


def test_a_streamed_answer_is_whole_and_leaves_the_books(server, board):
    """Guards against parts that are lost, and against a booking that outlives the stream."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {
        "token_ids": [5, 6, 7],
        "stream": True,
        "sampling_params": {"max_tokens": 20, "ignore_eos": True, "detokenize": False},
    }
    connection.request("POST", "/inference/v1/generate", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    lines = [line[6:] for line in response.read().decode().splitlines() if line.startswith("data: ")]
    connection.close()
    assert lines.pop() == "[DONE]"
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    assert sum(len(choice["token_ids"]) for choice in choices) == 20
    wait_until(lambda: checks.is_idle(board))


def test_a_request_goes_to_the_rank_that_it_names(server, board):
    """Guards against a gateway's choice, in a header, that the board's overrides or does not count."""
    sent = board.sent_requests[:, :RANKS].sum(axis=0)
    assert server.generate_all([(3, 8, 1)] * 5 + [(3, 8, 0)] * 2) == [8] * 7
    assert (board.sent_requests[:, :RANKS].sum(axis=0) - sent).tolist() == [2, 5]


def test_clients_that_go_away_leave_the_books(server, board):
    """Guards against a request that nobody waits for and that counts at its rank, or runs on, for ever."""
    finished = int(board.requests_finished[:RANKS].sum())
    body = {
        "token_ids": [5, 6, 7],
        "stream": True,
        "sampling_params": {"max_tokens": 1500, "ignore_eos": True, "detokenize": False},
    }
    connections = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=60) for _ in range(6)]
    for connection in connections:
        connection.request(
            "POST", "/inference/v1/generate", json.dumps(body), {"content-type": "application/json"}
        )
    for connection in connections[:3]:
        assert connection.getresponse().readline().startswith(b"data: ")
    wait_until(lambda: board.snapshot()["requests"].sum() == 6)
    for connection in connections:  # three before the first part of the answer, three after
        connection.close()
    wait_until(lambda: checks.is_idle(board), 20.0)
    assert int(board.requests_finished[:RANKS].sum()) <= finished + 6
    assert server.generate_all([(3, 4)] * 8) == [4] * 8
    wait_until(lambda: checks.is_idle(board))
    assert (board.sent_requests[:, :RANKS] == board.received_requests[:RANKS].T).all()


@pytest.mark.parametrize("level", [0, 1, 2])
def test_sleep_and_wake_up(server, board, level):
    """Guards against ranks that do not go to sleep, do not wake up, or keep what was running in the books."""
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(server.try_to_generate, [5, 6, 7], 1500) for _ in range(4)]
        wait_until(lambda: board.snapshot()["running"].sum() == 4)
        assert server.request("POST", f"/sleep?level={level}")[0] == 200
        assert all("abort" in future.result(60)[1] for future in running)
    assert json.loads(server.request("GET", "/is_sleeping")[1]) == {"is_sleeping": True}
    wait_until(lambda: set(board.snapshot()["state"].tolist()) == {"paused"})
    assert not board.snapshot()["requests"].any()
    assert server.request("POST", "/wake_up")[0] == 200
    assert json.loads(server.request("GET", "/is_sleeping")[1]) == {"is_sleeping": False}
    assert server.generate_all([(3, 4, rank) for rank in range(RANKS)] * 2) == [4] * RANKS * 2
    wait_until(lambda: checks.is_idle(board))


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_pause_and_resume(server, board, mode):
    """Guards against a pause that hangs or leaves bookings, in each of its ways to treat what runs."""
    with ThreadPoolExecutor(5) as pool:
        running = [pool.submit(server.try_to_generate, [5, 6, 7], 600) for _ in range(4)]
        wait_until(lambda: board.snapshot()["running"].sum() == 4)
        assert server.request("POST", f"/pause?mode={mode}")[0] == 200
        wait_until(lambda: set(board.snapshot()["state"].tolist()) == {"paused"})
        if mode != "keep":
            ended = [future.result(60) for future in running]
            assert all(("abort" in text) == (mode == "abort") for _, text in ended), ended
        assert server.request("POST", "/resume")[0] == 200
        assert all(future.result(60)[0] in (200, 503) for future in running)
    wait_until(lambda: checks.is_idle(board))
    assert server.generate_all([(3, 4)] * 8) == [4] * 8


def test_the_prefix_cache_is_reset(server, board):
    """Guards against an index that tells of blocks which a reset has dropped."""
    prompt = list(range(5, 905))
    for rank in range(RANKS):
        assert server.try_to_generate(prompt, 2, rank)[0] == 200
    wait_until(lambda: checks.is_idle(board))
    assert board.snapshot()["indexed_blocks"].min() > 0
    assert server.request("POST", "/reset_prefix_cache")[0] == 200
    assert server.generate_all([(3, 2, rank) for rank in range(RANKS)]) == [2] * RANKS  # publishes
    wait_until(lambda: board.snapshot()["indexed_blocks"].max() == 0)
