"""What front-ends take to be cached soon."""

from __future__ import annotations

import numpy as np
import pytest

from dpshm.board.sent_table import SLOTS, SentTable
from dpshm.frontend.sent_prompts import REMEMBERED_NS, SentPrompts
from dpshm.rules.prefix_samples import SAMPLED_BLOCKS, samples_of

SECOND = 1_000_000_000
NOW = 50 * SECOND


@pytest.fixture
def table(tmp_path):
    """A table of four front-ends."""
    return SentTable.open(tmp_path / "sent", 4)


def samples(*blocks: int):
    """Samples of a prompt that has these fingerprints."""
    return samples_of(np.array(blocks, np.uint64))


def extended(sent, blocks, held, now_ns=NOW):
    """What a front-end takes to be cached of a prompt with these fingerprints."""
    held = list(held)
    sent.extend(held, samples(*blocks), now_ns)
    return held


def test_what_two_prompts_have_in_common(table):
    """Guards against a run that is too long, one that is short by a ninth, and one that shrinks what is held."""
    one, other = SentPrompts(table, 1), SentPrompts(table, 3)
    for number, common in enumerate([*range(40), 100, 1000, 5000]):
        start = number * 100_000 + 1
        shared = range(start, start + common)
        one.add(3, samples(*shared, *range(start + 60_000, start + 60_007)), NOW)
        prompt = [*shared, *range(start + 80_000, start + 80_030)]
        for reader in (one, other):
            reader.rows = 4
            found = extended(reader, prompt, [0] * 5)
            assert found[:3] + found[4:] == [0] * 4
            assert found[3] == max((n for n in SAMPLED_BLOCKS if n <= common), default=0)
            assert 0.88 * common <= found[3] <= common
            held = [common + 2] * 5
            assert extended(reader, prompt, held) == held
            assert extended(reader, prompt, [-1] * 5) == [-1] * 5  # a rank without an index


def test_each_rank_has_the_longest_that_was_sent_there(table):
    """Guards against one prompt of many that hides a longer one."""
    sent = SentPrompts(table, 0)
    for dp_rank, blocks in ((0, 4), (0, 7), (0, 2), (2, 5)):
        sent.add(dp_rank, samples(*range(1, blocks + 1), 90 + dp_rank), NOW)
    assert extended(sent, range(1, 9), [1, 1, 1]) == [7, 1, 5]
    assert extended(sent, range(1, 7), [0, 0, 0]) == [6, 0, 5]
    assert extended(sent, [*range(1, 4), 77], [0, 0]) == [3, 0]  # rank 2 was scaled away
    assert extended(sent, [], [0, 0, 0]) == [0, 0, 0]


def test_what_was_sent_is_forgotten(table):
    """Guards against a memory that grows, or that outlives the request."""
    sent = SentPrompts(table, 0)
    for i in range(SLOTS + 1):
        sent.add(0, samples(i + 1), NOW)
    assert [extended(sent, [i + 1], [0]) for i in range(SLOTS + 1)] == [[0]] + [[1]] * SLOTS
    assert extended(sent, [2], [0], NOW + REMEMBERED_NS - 2_000_000) == [1]
    assert extended(sent, [2], [0], NOW + REMEMBERED_NS + 2_000_000) == [0]
    assert extended(sent, [2], [0], NOW - SECOND) == [0]  # a damaged stamp, or another clock
    assert extended(sent, [2], [0], NOW - 5_000_000) == [1]  # another front-end decided a moment later
    sent.forget(0, NOW + 2_000_000)
    assert extended(sent, [2], [0], NOW) == [0]
    sent.add(0, samples(2), NOW + 3_000_000)
    assert extended(sent, [2], [0], NOW + 3_000_000) == [1]
    sent.add(0, samples(), NOW)


def test_a_damaged_table_misleads_and_does_not_raise(table):
    """Guards against a front-end that ends because of words that another process stored."""
    random = np.random.default_rng(1)
    sent = SentPrompts(table, 0)
    sent.rows = 4
    for _ in range(50):
        table.stamps[:] = random.integers(0, 1 << 64, table.stamps.shape, np.uint64)
        table.samples[:] = random.integers(0, 3, table.samples.shape, np.uint64)
        now_ns = int(random.integers(0, 1 << 62))
        found = extended(sent, range(1, 9), [0, 3, -1, 0], now_ns)
        assert all(low <= n <= SAMPLED_BLOCKS[-1] for low, n in zip([0, 3, -1, 0], found, strict=True))
    table.stamps[:] = (NOW >> 20 << 16) + 60_000  # a rank that there is not
    assert extended(sent, range(1, 9), [0, 3]) == [0, 3]
