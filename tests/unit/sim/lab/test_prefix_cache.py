"""The prefix cache of a simulated rank."""

from __future__ import annotations

from dpshm.sim.lab.prefix_cache import PrefixCache

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
