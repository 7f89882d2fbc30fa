"""Dense ranks that die: the server stays up, answers, says which requests were lost, and has the ranks back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter

import pytest

from tests.e2e.vllm import checks, environment
from tests.e2e.vllm.server import executor
from tests.support import gone, wait_until

RANKS = 2
BACK_S = 300.0
OK, UNAVAILABLE = 200, 503
FATAL = 17  # see `failing_executor`, which cannot be imported here: it needs vLLM
STARTED_AGAIN_SINCE = (0, 32)

pytestmark = pytest.mark.skipif(
    environment.why_not() is None and environment.installed() < STARTED_AGAIN_SINCE,
    reason="before 0.32 vLLM has no error for one lost request: the death of a rank ends the server",
)


@pytest.fixture(scope="module")
def server(serve):
    """The server of this module."""
    failing = executor("tests.e2e.vllm.failing_executor.FailingExecutor")
    arguments = ("--data-parallel-size", str(RANKS), "--api-server-count", "2", *failing)
    return serve("dense", *arguments, forked=False)  # a rank is started again as vLLM's own command does it


@pytest.fixture
def board(server):
    """Its board, with all ranks there and idle."""
    with server.board() as board:
        wait_until(lambda: checks.is_idle(board), 20.0)
        yield board


class Load(threading.Thread):
    """Sends one request after the other, and keeps the answers."""

    def __init__(self, server):
        super().__init__()
        self.answers = []
        self.is_over = False
        self._server = server

    def run(self):
        """Sends until `is_over`."""
        while not self.is_over:
            self.answers.append(self._server.try_to_generate([5, 6, 7], 40))


def dead(server):
    """By rank, whether it is dead, from the page of metrics."""
    return server.metric("dpshm_rank_state", label="dp_rank", group=server.group, state="dead")


def back(server, board, rank, pid):
    """Whether a new process has the rank, and answers."""
    return int(board.engine_pid[rank]) not in (0, pid) and server.try_to_generate([5, 6], 2, rank)[0] == OK


def dies_and_comes_back(server, board, rank, kill):
    """Lets a rank die under load; all requests are answered, and the rank serves again."""
    pid = int(board.engine_pid[rank])
    loads = [Load(server) for _ in range(12)]
    for load in loads:
        load.start()
    wait_until(lambda: min(board.snapshot()["running"]) > 0, 20.0)
    kill(pid)
    wait_until(lambda: gone(pid), 20.0)
    wait_until(lambda: server.log.count(f"rank {rank} died. ") >= 2, 20.0)
    noticed = [len(load.answers) for load in loads]
    wait_until(lambda: back(server, board, rank, pid), BACK_S)
    for load in loads:
        load.is_over = True
    for load in loads:
        load.join(60.0)
        assert not load.is_alive(), "a request hangs"
    statuses = Counter(status for load in loads for status, _ in load.answers)
    assert set(statuses) == {OK, UNAVAILABLE}, statuses
    lost = [text for load in loads for status, text in load.answers if status == UNAVAILABLE]
    assert all(f"rank {rank} died" in text for text in lost), lost
    # One request of each client was in flight when the deaths were noticed; none that was sent later is lost.
    later = [a[0] for load, n in zip(loads, noticed, strict=True) for a in load.answers[n + 1 :]]
    assert set(later) == {OK}
    wait_until(lambda: checks.is_idle(board), 20.0)
    checks.answers_a_burst(server)
    assert (board.sent_requests[:, :RANKS] == board.received_requests[:RANKS].T).all()


def test_a_rank_that_is_killed_comes_back(server, board):
    """Guards against a server that ends, or requests that hang, because one of its ranks was killed."""
    dies_and_comes_back(server, board, 1, lambda pid: os.kill(pid, signal.SIGKILL))


def test_a_rank_whose_executor_fails_comes_back(server, board):
    """Guards against an engine that fails and ends all API servers with a message."""
    answers = []

    def poison(_):
        answers.append(server.try_to_generate([FATAL, 6, 7], 4, 0)[0])

    dies_and_comes_back(server, board, 0, poison)
    assert answers == [UNAVAILABLE]


def test_what_waits_for_a_rank_that_is_away_is_told(server, board):
    """Guards against pinned requests and calls to all ranks that wait for a process that is gone."""
    pid, before = int(board.engine_pid[1]), server.log.count("rank 1 died. ")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.log.count("rank 1 died. ") == before + 2, 20.0)
    began = time.monotonic()
    status, text = server.try_to_generate([5, 6], 2, 1)
    assert (status, "rank 1 died and is not back" in text) == (UNAVAILABLE, True), text
    assert server.request("POST", "/reset_prefix_cache")[0] >= UNAVAILABLE - 3
    assert time.monotonic() - began < BACK_S
    assert server.request("GET", "/health")[0] == OK
    assert dead(server) == {0: 0.0, 1: 1.0}
    wait_until(lambda: back(server, board, 1, pid), BACK_S)
    assert dead(server) == {0: 0.0, 1: 0.0}


def test_nothing_is_left_behind(server):
    """Guards against a process that was started again and outlives its server. The last test: it ends it."""
    server.stop()
    assert server.processes() == {}
    assert server.left() == []
