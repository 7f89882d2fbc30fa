"""The prefix cache of a simulated rank."""

from __future__ import annotations

from dpshm.sim.lab.prefix_cache import DelayedCache, PrefixCache

BLOCK_TOKENS = 512
ROOM = 100 * BLOCK_TOKENS


def test_the_longest_leading_run_is_found():
    """Guards against hits on blocks behind one that is missing, whose keys and values depend on it."""
    cache = PrefixCache(BLOCK_TOKENS)
    cache.insert((1, 2, 3), ROOM)
    assert cache.hit_tokens((1, 2, 9, 3), 4 * BLOCK_TOKENS) == 2 * BLOCK_TOKENS
    assert cache.hit_tokens((9, 1, 2), 3 * BLOCK_TOKENS) == 0


def test_one_token_is_always_computed():
    """Guards against a prompt of no work, from which no token would come."""
    cache = PrefixCache(BLOCK_TOKENS)
    cache.insert((1, 2), ROOM)
    assert cache.hit_tokens((1, 2), 2 * BLOCK_TOKENS) == 2 * BLOCK_TOKENS - 1
    assert cache.hit_tokens((1, 2), 700) == 699


def test_the_least_recently_used_goes_first():
    """Guards against a cache that grows beyond its room, and against losing what all prompts share."""
    cache = PrefixCache(BLOCK_TOKENS)
    for leaf in range(10):
        cache.insert((0, 100 + leaf), 4 * BLOCK_TOKENS)
    assert len(cache) == 4
    assert cache.hit_tokens((0, 109), 2 * BLOCK_TOKENS + 1) == 2 * BLOCK_TOKENS
    assert cache.hit_tokens((0, 101), 2 * BLOCK_TOKENS + 1) == BLOCK_TOKENS
    cache.insert((), -5)
    assert len(cache) == 0


def test_changes_arrive_late_and_in_order():
    """Guards against a delayed index that knows too much, or that undoes an eviction by an older insertion."""
    cache, late = PrefixCache(BLOCK_TOKENS), DelayedCache(0.1, BLOCK_TOKENS)
    cache.changed = late.note
    cache.insert((1, 2), 2 * BLOCK_TOKENS)
    cache.now_s = 0.05
    cache.insert((1, 3), 2 * BLOCK_TOKENS)  # evicts 2
    cache.now_s = 0.06
    cache.insert((1, 2), 2 * BLOCK_TOKENS)  # and back
    prompt = 5 * BLOCK_TOKENS

    def known(now_s: float) -> list[int]:
        return [late.hit_tokens(now_s, blocks, prompt) // BLOCK_TOKENS for blocks in ((1, 2), (1, 3))]

    assert known(0.09) == [0, 0]
    assert known(0.11) == [2, 1]
    assert known(0.155) == [1, 2]
    assert known(0.17) == [2, 1]


def test_what_is_held_is_not_announced_again():
    """Guards against an index whose entries count the uses of a block instead of the block."""
    cache, changes = PrefixCache(BLOCK_TOKENS), []
    cache.changed = lambda now_s, block, held: changes.append((now_s, block, held))
    cache.insert((1, 2), ROOM)
    cache.insert((1, 2), ROOM)
    assert sorted(changes) == [(0.0, 1, True), (0.0, 2, True)]
    cache.insert((), 0)
    assert sorted(changes[2:]) == [(0.0, 1, False), (0.0, 2, False)]
