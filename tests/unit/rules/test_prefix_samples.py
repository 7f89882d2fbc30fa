"""Which blocks of a prompt are sampled."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from dpshm.rules.prefix_samples import SAMPLED_BLOCKS, SAMPLES, samples_of, samples_within


def test_samples_are_dense_at_first_and_short_by_less_than_a_ninth():
    """Guards against a prefix that two prompts share and of which hardly anything counts."""
    assert len(SAMPLED_BLOCKS) == SAMPLES
    assert SAMPLED_BLOCKS[:18] == (*range(1, 17), 18, 20)
    assert SAMPLED_BLOCKS[-1] == 262_144
    for low, high in pairwise(SAMPLED_BLOCKS):
        assert low < high
        assert high - 1 - low < (high - 1) / 9


def test_samples_of_prompts():
    """Guards against a sample beyond the prompt, and one of another block than it stands for."""
    for blocks in (0, 1, 2, 8, 9, 10, 11, 1000, 300_000):
        fingerprints = np.arange(1, blocks + 1, dtype=np.uint64)
        expected = [n for n in SAMPLED_BLOCKS if n <= blocks]
        assert samples_of(fingerprints).tolist() == expected
        assert samples_within(blocks) == len(expected)
