"""Which blocks of a prompt are sampled."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from dpshm.rules.prefix_samples import SAMPLED_BLOCKS, SAMPLES, samples_of, samples_within


def test_samples_are_dense_at_first_and_short_by_less_than_a_fifth():
    """Guards against a prefix that two prompts share and of which hardly anything counts."""
    assert len(SAMPLED_BLOCKS) == SAMPLES
    assert SAMPLED_BLOCKS[:10] == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)
    assert SAMPLED_BLOCKS[-1] == 131_072
    for low, high in pairwise(SAMPLED_BLOCKS):
        assert low < high
        assert high - 1 - low < (high - 1) / 5


def test_samples_of_prompts():
    """Guards against a sample beyond the prompt, and one of another block than it stands for."""
    for blocks in (0, 1, 2, 8, 9, 10, 11, 1000, 140_000):
        fingerprints = np.arange(1, blocks + 1, dtype=np.uint64)
        expected = [n for n in SAMPLED_BLOCKS if n <= blocks]
        assert samples_of(fingerprints).tolist() == expected
        assert samples_within(blocks) == len(expected)
