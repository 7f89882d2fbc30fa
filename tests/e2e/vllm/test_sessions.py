"""Sessions on a real server whose prompts no API server can look up: each keeps its rank, unless it is loaded."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest

from dpshm.board.layout import STEP_MODEL_WORDS
from tests.e2e.vllm import checks, environment
from tests.e2e.vllm.server import NO_MODEL
from tests.support import wait_until

RANKS = 2
QUEUE = 96
MAX_RUNNING = STEP_MODEL_WORDS.index("max_running")
SESSIONS_SINCE = (0, 32)
TURNS = 5
FIRST_TOKENS, MORE_TOKENS = 200, 40
BLOCK_TOKENS = 32  # the default of some platforms, 128, is more than a turn brings

pytestmark = pytest.mark.skipif(
    environment.why_not() is None and (environment.installed() < SESSIONS_SINCE or not environment.has("xxhash")),
    reason="vLLM knows sessions from 0.32 on, and needs the package xxhash for hashes with a random seed",
)


@pytest.fixture(scope="module")
def server(serve):
    """The server of this module; the seed of its block hashes is random."""
    hashing = "--enable-prefix-caching", "--prefix-caching-hash-algo", "xxhash", "--block-size", str(BLOCK_TOKENS)
    ranks = ("--data-parallel-size", str(RANKS), "--api-server-count", "2")
    return serve("dense", *ranks, *hashing, *NO_MODEL)


@pytest.fixture
def board(server):
    """Its board, with all ranks idle."""
    with server.board() as board:
        wait_until(lambda: checks.is_idle(board), 20.0)
        yield board


def rank_of(server, board, session, prompt):
    """The rank that got a request of a session; it is the only request."""
    before = board.sent_requests[:, :RANKS].sum(axis=0)
    body = {"token_ids": prompt, "sampling_params": {"max_tokens": 4, "ignore_eos": True, "detokenize": False}}
    status, text = server.request("POST", "/inference/v1/generate", body, **{"X-Session-ID": session})
    assert status == 200, text
    (rank,) = (board.sent_requests[:, :RANKS].sum(axis=0) - before).nonzero()[0].tolist()
    return rank


def test_a_session_stays_where_its_cache_is_unless_the_rank_is_loaded(server, board):
    """Guards against a conversation whose turns go from rank to rank, and one that waits at a loaded rank."""
    assert "is random in each process" in server.log, server.log[-4000:]
    rng = random.Random(5)
    prompts = {f"session {i}": [rng.randrange(5, 1000) for _ in range(FIRST_TOKENS)] for i in range(8)}
    ranks = defaultdict(set)
    for _ in range(TURNS):
        for session, prompt in prompts.items():
            ranks[session].add(rank_of(server, board, session, prompt))
            prompt += [rng.randrange(5, 1000) for _ in range(MORE_TOKENS)]
    assert all(len(its) == 1 for its in ranks.values()), ranks
    assert set.union(*ranks.values()) == {0, 1}
    hits = sum(server.metric("vllm:prefix_cache_hits_total").values())
    asked = sum(server.metric("vllm:prefix_cache_queries_total").values())
    before = [FIRST_TOKENS + turn * MORE_TOKENS for turn in range(TURNS - 1)]  # tokens of each turn but the last
    assert hits == len(prompts) * sum(tokens // BLOCK_TOKENS * BLOCK_TOKENS for tokens in before)
    session, (home,) = next(iter(ranks.items()))
    with ThreadPoolExecutor(1) as pool:
        # More than run at once: what others decode there costs a first token little, and is no reason to leave.
        loaded = pool.submit(server.generate_all, [(3, 400, home)] * QUEUE, QUEUE)
        wait_until(lambda: board.snapshot()["requests"][home] == QUEUE)
        wait_until(lambda: board.step_model[home, MAX_RUNNING])  # it has learnt how many run at once
        assert rank_of(server, board, session, prompts[session]) != home
        assert loaded.result() == [400] * QUEUE
    wait_until(lambda: checks.is_idle(board))

    def is_back():
        server.generate_all([(3, 8, rank) for rank in range(RANKS)])  # steps without the load, on each rank
        return rank_of(server, board, session, prompts[session]) == home

    wait_until(is_back, 60.0)
    print(json.dumps({"hits": hits, "asked": asked}))
