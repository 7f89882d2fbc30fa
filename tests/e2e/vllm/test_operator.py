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
