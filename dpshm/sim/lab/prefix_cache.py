"""A rank's prefix cache: which blocks of prompts it still holds, least recently used first to go.

As in vLLM, a prompt is cut into blocks of `BLOCK_TOKENS`; a block is known by a hash that covers all before it,
so a prompt finds its longest leading run of blocks that are held and computes the rest. The cache lives in
what running requests leave free of the KV cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

BLOCK_TOKENS = 512
"""As in the Mooncake traces."""


class PrefixCache:
    """The blocks of one rank."""

    def __init__(self) -> None:
        self._held: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def hit_tokens(self, blocks: Sequence[int], prompt_tokens: int) -> int:
        """Tokens of a prompt that need not be computed; at least one always must be."""
        count = 0
        for block in blocks:
            if block not in self._held:
                break
            count += 1
        return min(count * BLOCK_TOKENS, prompt_tokens - 1)

    def insert(self, blocks: Sequence[int], free_tokens: int) -> None:
        """Holds a prompt's blocks as the most recently used, and no more blocks than fit `free_tokens`."""
        held = self._held
        for block in reversed(blocks):  # the first last: what many prompts share stays longest
            held[block] = None
            held.move_to_end(block)
        while len(held) > max(0, free_tokens) // BLOCK_TOKENS:
            held.popitem(last=False)
