"""Tests of `dpshm.vllm.prefix_cache`: the index of a rank is what vLLM's pool holds, on a real board."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from dpshm.board.layout import CACHE_WORDS, STEP_WORDS
from dpshm.board.prefix_file import index_path
from dpshm.board.prefix_index import PrefixIndexReader, PrefixIndexWriter
from dpshm.engine.row import EngineRow
from dpshm.rules.prefix_hash import DigestReducer
from dpshm.vllm.prefix_cache import PrefixCache
from tests.unit.vllm.fake_cache import (
    Block,
    BlockPool,
    FullAttentionManager,
    SlidingWindowManager,
    hash_function,
    kv_cache_manager,
)
from tests.unit.vllm.fake_client import raising
from tests.unit.vllm.fake_core import Request, Scheduler, run, send

GROUP_0, GROUP_1 = bytes(4), b"\0\0\0\1"


@pytest.fixture
def row(vllm, group, using, coordinator):
    """The row of rank 0."""
    return using(EngineRow.attach(group, 0))


def scheduler_with(pool, managers=None):
    """A scheduler with a prefix cache."""
    scheduler = Scheduler()
    scheduler.kv_cache_manager = kv_cache_manager(pool, managers)
    return scheduler


def reader_of(row):
    """A front-end's end of the index."""
    return PrefixIndexReader.open(index_path(row.board.segment.sockets_path, row.dp_rank))


def word(board, name):
    """A word of rank 0's cache, or what its requests hold."""
    if name == "held_tokens":
        return board.words[board.index("step_model", 0, STEP_WORDS.index(name))]
    return board.words[board.index("cache_state", 0, CACHE_WORDS.index(name))]


def mirrors(row, prefix, pool, group=GROUP_0):
    """Whether the index holds exactly the keys of a group."""
    prefix.show()
    reader, reducer = reader_of(row), DigestReducer(row.board.segment.header.prefix_key)
    keys = [key for key in pool.cached_block_hash_to_block._cache if key.endswith(group)]
    return reader.counters()["held"] == len(keys) and all(
        reader.has(reducer.fingerprint(key[:-4])) for key in keys
    )


def test_the_index_is_the_cache(row):
    """Guards against a block that leaves the index while another block still has its content, or that stays."""
    pool = BlockPool()
    managers = [FullAttentionManager(pool), SlidingWindowManager(pool, 1)]
    hashes = [hash_function(i) for i in range(40)]
    pool.cached_block_hash_to_block.insert(hashes[0] + GROUP_0, Block(1000))  # before the hooks
    prefix = PrefixCache.open(row, scheduler_with(pool, managers), 0)
    assert prefix is not None
    assert mirrors(row, prefix, pool)
    rng = random.Random(4)
    held = pool.cached_block_hash_to_block
    for step in range(3000):
        key, block_id = rng.choice(hashes) + rng.choice((GROUP_0, GROUP_0, GROUP_1)), rng.randrange(3)
        if rng.random() < 0.5:
            held.insert(key, Block(block_id))
        else:
            held.pop(key, block_id)
        if step % 10 == 0:
            assert mirrors(row, prefix, pool)
    assert mirrors(row, prefix, pool)
    assert reader_of(row).counters()["inserted"] > 100


def test_the_index_shows_a_step_before_it_is_computed(row):
    """Guards against front-ends that learn of a prompt's blocks only when a long step is over."""
    scheduler = scheduler_with(BlockPool())
    assert PrefixCache.open(row, scheduler, 0) is not None
    scheduler.add_request(Request("a", prompt=32))
    scheduler.schedule()
    keys = list(scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block._cache)
    reader, reducer = reader_of(row), DigestReducer(row.board.segment.header.prefix_key)
    assert len(keys) == 8
    assert all(reader.has(reducer.fingerprint(key[:-4])) for key in keys)


def test_a_step_moves_blocks_any_number_of_times(row):
    """Guards against an index that counts the moves of one step instead of what is held at its end."""
    pool = BlockPool()
    prefix = PrefixCache.open(row, scheduler_with(pool), 0)
    held, kept = pool.cached_block_hash_to_block, hash_function(1) + GROUP_0
    for block_id in (1, 2):  # two blocks with one content
        held.insert(kept, Block(block_id))
    passing = [hash_function(i) + GROUP_0 for i in range(2, 9)]
    for key in passing:
        held.insert(key, Block(3))
        held.pop(key, 3)
    held.pop(kept, 1)
    prefix.show()
    counters = reader_of(row).counters()
    assert (counters["inserted"], counters["evicted"], counters["held"]) == (1, 0, 1)
    held.pop(kept, 2)
    held.insert(kept, Block(4))
    held.insert(passing[0], Block(5))
    prefix.show()
    assert mirrors(row, prefix, pool)
    held.pop(kept, 4)
    assert mirrors(row, prefix, pool)
    assert word(row.board, "indexed_blocks") == 1
    held.insert(passing[1], Block(6))  # a reset forgets what was touched before it
    assert pool.reset_prefix_cache()
    assert mirrors(row, prefix, pool)
    assert reader_of(row).counters()["held"] == 0


def test_a_reset_empties_the_index_and_the_next_map_is_hooked(row):
    """Guards against an index that goes on telling of a cache which was emptied, or is deaf afterwards."""
    pool = BlockPool()
    prefix = PrefixCache.open(row, scheduler_with(pool), 0)
    first = pool.cached_block_hash_to_block
    block = pool.take(hash_function(1) + GROUP_0)
    assert not pool.reset_prefix_cache()  # a block is in use: vLLM keeps its map
    assert pool.cached_block_hash_to_block is first
    assert mirrors(row, prefix, pool)
    pool.free.append(block)
    assert pool.reset_prefix_cache()
    assert reader_of(row).counters()["held"] == 0
    pool.take(hash_function(2) + GROUP_0)
    assert mirrors(row, prefix, pool)
    first.insert(hash_function(3) + GROUP_0, Block(1))
    assert mirrors(row, prefix, pool)


def test_a_block_that_was_taken_and_given_back_in_one_step_is_counted(row):
    """Guards against counters, and indexes on other nodes, that miss the blocks of a request of one step."""
    pool = BlockPool()
    prefix = PrefixCache.open(row, scheduler_with(pool), 0)
    prefix.show()
    pool.free.append(pool.take(hash_function(1) + GROUP_0))
    prefix.show()
    assert reader_of(row).counters()["held"] == word(row.board, "indexed_blocks") == 1


def test_of_a_hybrid_model_the_full_attention_is_indexed(row, log):
    """Guards against an index with the blocks of a sliding window, whose prompts have holes."""
    pool = BlockPool()
    managers = [SlidingWindowManager(pool, 0), FullAttentionManager(pool, 1)]
    prefix = PrefixCache.open(row, scheduler_with(pool, managers), 0)
    for i, group in enumerate((GROUP_0, GROUP_1, GROUP_1)):
        pool.take(hash_function(i) + group)
    assert mirrors(row, prefix, pool, GROUP_1)
    assert reader_of(row).counters()["held"] == 2
    assert log("group 1 of 2") == 1


def test_without_full_attention_there_is_no_index(row, log):
    """Guards against a match of prompts that the engine would not find."""
    pool = BlockPool()
    assert PrefixCache.open(row, scheduler_with(pool, [SlidingWindowManager(pool)]), 0) is None
    assert log("no KV cache group with full attention") == 1
    assert word(row.board, "index_incarnation") == 0


def test_without_prefix_caching_there_is_no_index(row, log):
    """Guards against memory for an index that stays empty."""
    assert PrefixCache.open(row, scheduler_with(BlockPool(enable_caching=False)), 0) is None
    assert word(row.board, "index_incarnation") == 0
    assert log("prefix cache") == 0


@pytest.mark.parametrize("broken", ["enter", "leave", "clear"])
def test_a_failure_of_ours_ends_the_index_and_not_the_cache(row, log, monkeypatch, broken):
    """Guards against a bug of dpshm that breaks vLLM's cache, that is logged for each block, or leaves a lie."""
    pool = BlockPool(num_gpu_blocks=5)
    scheduler = scheduler_with(pool)
    prefix = PrefixCache.open(row, scheduler, 0)
    monkeypatch.setattr(PrefixIndexWriter, broken, raising)
    for i in range(6):
        pool.free.append(pool.take(hash_function(i) + GROUP_0))
        prefix.show()
    assert len(pool.cached_block_hash_to_block._cache) == 4
    assert pool.reset_prefix_cache()
    assert pool.cached_block_hash_to_block._cache == {}
    pool.take(hash_function(1) + GROUP_0)
    prefix.show()
    assert log("no longer see the prefix cache of engine 0") == 1
    assert word(row.board, "index_incarnation") == 0
    assert "insert" not in vars(pool.cached_block_hash_to_block)
    assert "reset_prefix_cache" not in vars(pool)
    assert "schedule" not in vars(scheduler)


@pytest.mark.parametrize("unlike", ["map", "hash", "scheduler"])
def test_a_pool_of_another_release_is_left_alone(row, log, vllm, unlike):
    """Guards against an engine without a row because its cache has other names, or hashes, than those known, and
    against hooks that stay without an index.
    """
    pool = BlockPool()
    scheduler = scheduler_with(pool)
    if unlike == "map":
        del pool.cached_block_hash_to_block._cache
    elif unlike == "hash":
        vllm.hashes.NONE_HASH = b"short"
    else:
        scheduler = SimpleNamespace(kv_cache_manager=scheduler.kv_cache_manager)
    assert PrefixCache.open(row, scheduler, 0) is None
    assert not {"insert", "pop"} & vars(pool.cached_block_hash_to_block).keys()
    assert "reset_prefix_cache" not in vars(pool)
    assert log("do not see the prefix cache of engine 0") == 1
    assert word(row.board, "index_incarnation") == 0


def test_the_row_shows_the_cache(make_core, board):
    """Guards against counters of the cache that stand still, or count a hit twice."""
    core = make_core()
    core.scheduler.kv_cache_manager = kv_cache_manager(BlockPool())

    def body():
        assert word(board, "num_blocks") == 65
        assert word(board, "block_tokens") == 4
        send(core, Request("a", prompt=30, max_tokens=3))
        core.turn()
        assert word(board, "blocks_in_use") == 7
        assert word(board, "held_tokens") == 30
        send(core, Request("b", prompt=30, max_tokens=1))
        core.turn()
        assert word(board, "cached_tokens") == 28
        core.turn()
        assert word(board, "held_tokens") == word(board, "blocks_in_use") == 0
        send(core, Request("c", prompt=10, max_tokens=1))
        core.turn()
        assert word(board, "cached_tokens") == 36
        assert int(board.snapshot()[0]["prompt_tokens"]) == 70 - 36

    run(core, body)
    assert "insert" not in vars(core.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block)
    assert word(board, "index_incarnation") == 0
