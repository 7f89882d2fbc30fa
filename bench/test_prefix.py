"""What a prompt costs: its hash, the look-up in 8 ranks' indexes and in what was just sent; and the engine's side.

The ranks hold half of the prompt to nearly all of it, each another part. "Just sent" are prompts of 8 front-ends
within the last second: none; 40 of other prompts; 256 that begin like this one, as far as the ranks hold it; 256
that agree with it beyond that, which is the dearest case.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.fixture_board import FixtureBoard
from dpshm import Engine
from dpshm.board.prefix_file import index_path
from dpshm.board.prefix_index import PrefixIndexWriter
from dpshm.board.sent_table import SLOTS, SentTable, sent_path
from dpshm.frontend.prefix_reader import PrefixReader
from dpshm.frontend.sent_prompts import SentPrompts
from dpshm.rules.prefix_hash import PrefixHasher, Prompt
from dpshm.rules.prefix_samples import samples_of

RANKS, BLOCK = 8, 16
TOKENS = [4096, 32_768]
_VOCABULARY = 150_000


def tokens_of(seed: int, count: int) -> Any:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, _VOCABULARY, count).astype(np.uint32)


def timed(benchmark: Any, call: Callable[[], object], setup: Callable[[], None] | None = None) -> None:
    """Times one call."""
    benchmark.pedantic(call, setup=setup, rounds=500, iterations=1, warmup_rounds=20)


@pytest.fixture
def fixture(using: Any) -> FixtureBoard:
    """A board with a folder for sockets, 8 engines and 8 front-ends."""
    found: FixtureBoard = using(FixtureBoard(RANKS, 8, policy="least_work"))
    found.board.segment.sockets_path.mkdir(0o700)
    return found


def fill(fixture: FixtureBoard, using: Any, prompt: Any) -> list[Engine]:
    """Engines that hold parts of a prompt."""
    engines = [using(Engine.attach(fixture.board.segment.group, rank)) for rank in range(RANKS)]
    for rank, engine in enumerate(engines):
        cache = engine.open_cache(70_000, block_tokens=BLOCK)
        made = cache.hasher.fingerprints(prompt)
        cache.insert(made[: len(made) * (8 + rank) // 16])
    return engines


@pytest.mark.benchmark(group="a prompt: its hash")
@pytest.mark.parametrize("kind", ["array", "list"])
@pytest.mark.parametrize("count", TOKENS)
def test_hash(benchmark: Any, count: int, kind: str) -> None:
    """Of an array, and of a list that is converted."""
    hasher, array = PrefixHasher(BLOCK, 12_345), tokens_of(1, count)
    tokens = array if kind == "array" else array.tolist()
    timed(benchmark, lambda: hasher.fingerprints(tokens))


@pytest.mark.benchmark(group="a prompt: look-up in 8 ranks, hash included")
@pytest.mark.parametrize("sent", ["none", "40 unlike", "256 alike", "256 beyond"])
@pytest.mark.parametrize("count", TOKENS)
def test_look_up(benchmark: Any, fixture: FixtureBoard, using: Any, count: int, sent: str) -> None:
    """What `route` adds for a prompt that is passed."""
    prompt = tokens_of(1, count)
    fill(fixture, using, prompt)
    fixture.beat()
    board = fixture.board
    prefixes = PrefixReader(board, fixture.frontend.index)
    prefixes.refresh(time.monotonic_ns(), 0)
    hasher = PrefixHasher(BLOCK, board.segment.header.prefix_key)
    shared = {"none": 0, "40 unlike": 0, "256 alike": count // 4, "256 beyond": count - BLOCK}[sent]
    each = {"none": 0, "40 unlike": 5}.get(sent, SLOTS)
    noted = [
        samples_of(hasher.fingerprints(np.concatenate((prompt[:shared], tokens_of(9 + i, count - shared)))))
        for i in range(8 * each)
    ]

    def note() -> None:
        now_ns = time.monotonic_ns()
        for i, samples in enumerate(noted):
            others[i % 8].add(i % RANKS, samples, now_ns)

    table = SentTable.open(sent_path(board.segment.sockets_path), board.frontends)
    others = [SentPrompts(table, row) for row in range(8)]
    note()
    timed(benchmark, lambda: prefixes.look_up(Prompt(prompt), count, time.monotonic_ns()), note)


@pytest.mark.benchmark(group="a prompt: noted as sent")
def test_note(benchmark: Any, fixture: FixtureBoard, using: Any) -> None:
    """What `route` adds after the choice."""
    prompt = tokens_of(1, 4096)
    fill(fixture, using, prompt)
    prefixes = PrefixReader(fixture.board, fixture.frontend.index)
    prefixes.refresh(time.monotonic_ns(), 0)
    lookup = prefixes.look_up(Prompt(prompt), 4096, time.monotonic_ns())
    timed(benchmark, lambda: prefixes.sent(lookup, 3, time.monotonic_ns()))


@pytest.mark.benchmark(group="an engine's index: 1,000 blocks")
@pytest.mark.parametrize("call", ["enter", "leave"])
def test_index(benchmark: Any, tmp_path: Any, call: str) -> None:
    """1,000 blocks of a full index, one at a time, as an engine with names of its own does it."""
    writer = PrefixIndexWriter.create(
        index_path(tmp_path, 0), num_blocks=62_500, block_tokens=BLOCK, identity=1, incarnation=1
    )
    words = np.random.default_rng(2).integers(1, 1 << 63, 62_500, np.uint64).tolist()
    writer.insert(words[1000:])
    moving = words[:1000]

    def enter() -> None:
        for word in moving:
            writer.enter(word, word)

    def leave() -> None:
        for word in moving:
            writer.leave(word)

    if call == "enter":
        enter()
        timed(benchmark, enter, leave)
    else:
        timed(benchmark, leave, enter)
