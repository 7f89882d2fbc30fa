"""Prompts of a replayed trace: the trace has hashes of their blocks in the place of tokens.

A trace's hash stands for a whole prefix up to the end of a block, as a fingerprint of the prefix index does
(`dpshm.rules.prefix_hash`). So the fingerprint of a block is its hash, mixed with the group's key.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from dpshm.rules.hashing import mix, mix_array
from dpshm.rules.prefix_hash import Fingerprints, Prompt

_MASK = (1 << 64) - 1


@lru_cache(maxsize=4)
def identity_of(block_tokens: int) -> int:
    """Tells an index of a trace's blocks from one of tokens: 63 bits."""
    return mix(mix(block_tokens) ^ 0x7472616365) >> 1  # "trace"


def fingerprint_of(block: int, key: int) -> int:
    """The fingerprint of one block."""
    return mix((block ^ key) & _MASK) or 1


class TracePrompt(Prompt):
    """A prompt of which only the blocks' hashes are known."""

    def __init__(self, blocks: Sequence[int], block_tokens: int) -> None:
        super().__init__(())
        self._blocks = blocks
        self._block_tokens = block_tokens

    def fingerprints(self, block_tokens: int, identity: int, key: int) -> Fingerprints | None:
        """The blocks' fingerprints; None for an index of another kind."""
        if (block_tokens, identity) != (self._block_tokens, identity_of(self._block_tokens)):
            return None
        found = mix_array(np.array([(block ^ key) & _MASK for block in self._blocks], np.uint64))
        found[found == 0] = 1
        return found
