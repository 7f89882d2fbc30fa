"""The prefix index on a real vLLM: what API servers expect to be cached, and what the engines then report."""

from __future__ import annotations

import http
import json
import os
import random
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpshm.board.layout import CACHE_WORDS
from tests.e2e.vllm import checks, environment
from tests.e2e.vllm.server import NO_MODEL, Server
from tests.support import wait_until

RANKS = 2
BLOCK = 16
PROBES = Path(__file__).parent / "probes"
SEED = {"PYTHONHASHSEED": "7"} if environment.why_not() is None and environment.installed() < (0, 32) else {}
"""Before 0.32 each process makes block hashes with a random seed, unless this variable is set."""


@pytest.fixture(scope="module")
def probed(serve, tmp_path_factory) -> tuple[Server, Path]:
    """A server with prefix caching, and the folder of its probes."""
    folder = tmp_path_factory.mktemp("probes")
    server = serve(
        *("dense", "--data-parallel-size", str(RANKS), "--api-server-count", "2", "--enable-prefix-caching"),
        *("--block-size", str(BLOCK), *NO_MODEL),
        PYTHONPATH=f"{PROBES}:{environment.ROOT}",
        PROBE_FOLDER=str(folder),
        SLEEPER_STEP_MS="1,0.002,0.01",
        DPSHM_POLICY="least_work",
        **SEED,
    )
    return server, folder


def lines_of(folder: Path) -> dict[str, dict[str, int]]:
    """What the probes wrote: by kind, tokens by request."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            kind, request_id, tokens = line.split()
            found[kind][request_id] = int(tokens)
    return found


def conversations(seed: int, number: int, turns: int) -> list[list[list[int]]]:
    """Prompts by conversation and turn: all begin with one of three system prompts, each turn adds to the last."""
    rng = random.Random(seed)
    systems = [[rng.randrange(5, 1000) for _ in range(n)] for n in (40, 160, 333)]
    found = []
    for _ in range(number):
        prompt = list(rng.choice(systems))
        steps = []
        for _ in range(turns):
            prompt = prompt + [rng.randrange(5, 1000) for _ in range(rng.randrange(1, 120))]
            steps.append(prompt)
        found.append(steps)
    return found


def play(server: Server, prompts: list[list[list[int]]], threads: int) -> int:
    """Sends all conversations, each turn after the answer to the last; how many requests that were."""

    def one(turns: list[list[int]]) -> int:
        for prompt in turns:
            status, text = server.try_to_generate(prompt, max_tokens=4)
            assert status == http.HTTPStatus.OK, text[:500]
        return len(turns)

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(one, prompts))


def compared(folder: Path, number: int) -> tuple[int, int, int]:
    """Requests of which the expectation is what the engine reported; tokens expected, tokens reported."""
    wait_until(lambda: len(lines_of(folder)["reported"]) == number)
    found = lines_of(folder)
    expected, reported = found["expected"], found["reported"]
    assert expected.keys() == reported.keys()
    equal = sum(expected[request_id] == tokens for request_id, tokens in reported.items())
    return equal, sum(expected.values()), sum(reported.values())


@pytest.mark.parametrize(
    ("kind", "requests", "blocks"), [("full", 400, 2000), ("eagle", 200, 1200), ("hybrid", 200, 1200)]
)
def test_the_match_is_the_hit_of_vllms_own_cache(group, capsys, kind, requests, blocks):
    """Guards against hashes, or a mirror of the cache, that differ from vLLM's, also while it evicts."""
    python = environment.folder() / "bin" / "python"
    command = [python, "-m", "tests.e2e.vllm.real_cache", group, kind, str(requests), str(blocks)]
    environ = os.environ | {"PYTHONPATH": str(environment.ROOT), "OMP_NUM_THREADS": "1"} | SEED
    done = subprocess.run(
        command, cwd=environment.ROOT, env=environ, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\nvLLM's own cache manager, {kind}: {found}")
    # With a sliding window the hit ends where its blocks were evicted, and is never longer than the match.
    assert found["covered"] == requests
    assert kind == "hybrid" or found["equal"] == requests
    assert found["hits"] > 100 * requests
    assert found["evicted"] > blocks / 4
    assert found["held"] == 0


def test_the_match_is_what_the_engine_reports(probed, capsys):
    """Guards against hashes, or a mirror of the cache, that differ from vLLM's."""
    server, folder = probed
    prompts = conversations(1, 40, 5)
    number = play(server, prompts, threads=1)
    equal, expected, reported = compared(folder, number)
    tokens = sum(len(prompt) for turns in prompts for prompt in turns)
    with capsys.disabled():
        print(
            f"\none at a time: {equal} of {number} requests as expected; "
            f"cached tokens expected {expected}, reported {reported}, of {tokens}"
        )
    assert equal >= 0.99 * number
    assert reported > tokens / 2
    with server.board() as board:
        wait_until(lambda: checks.is_idle(board))
        found = [
            board.words[board.index("cache_state", rank, CACHE_WORDS.index("cached_tokens"))]
            for rank in range(RANKS)
        ]
        assert sum(found) == reported


def test_sums_are_exact_under_load(probed, capsys):
    """Guards against a hit that stays in the sums because the two sides count other numbers."""
    server, folder = probed
    before = len(lines_of(folder)["reported"])
    number = before + play(server, conversations(2, 40, 5), threads=12)
    equal, expected, reported = compared(folder, number)
    with capsys.disabled():
        print(
            f"\nall, 12 at a time too: {equal} of {number} as expected; {expected} expected, {reported} reported"
        )
    checks.board_agrees_with_vllm(server)
