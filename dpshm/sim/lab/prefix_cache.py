"""A rank's prefix cache: which blocks of prompts it still holds, least recently used first to go.

As in vLLM, a prompt is cut into blocks of equal size; a block is known by a hash that covers all before it,
so a prompt finds its longest leading run of blocks that are held and computes the rest. A block is held from when
the step that computes it is planned: the next request that is admitted finds it. The cache lives in what running
requests leave free of the KV cache.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Container, Sequence


class PrefixCache:
    """The blocks of one rank.

    Attributes:
        block_tokens: prompt tokens in a block.
        changed: called with the time, a block, and whether it is held now; for routers that receive events.
        now_s: the time, for `changed`.
    """

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._held: OrderedDict[int, None] = OrderedDict()
        self.changed: Callable[[float, int, bool], None] | None = None
        self.now_s = 0.0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, block: object) -> bool:
        return block in self._held

    def hit_tokens(self, blocks: Sequence[int], prompt_tokens: int) -> int:
        """Tokens of a prompt that need not be computed. At least one token must always be computed."""
        return hit_tokens(self._held, blocks, prompt_tokens, self.block_tokens)

    def insert(self, blocks: Sequence[int], free_tokens: int) -> None:
        """Stores a prompt's blocks as the most recently used, and keeps no more blocks than fit `free_tokens`."""
        held, changed = self._held, self.changed
        for block in reversed(blocks):  # the first last: what many prompts share stays longest
            if changed and block not in held:
                changed(self.now_s, block, True)
            held[block] = None
            held.move_to_end(block)
        while len(held) > max(0, free_tokens) // self.block_tokens:
            block, _ = held.popitem(last=False)
            if changed:
                changed(self.now_s, block, False)


class DelayedCache:
    """A rank's blocks as a router sees them that receives events: each change arrives `delay_s` later."""

    def __init__(self, delay_s: float, block_tokens: int) -> None:
        self._delay_s = delay_s
        self._block_tokens = block_tokens
        self._held: set[int] = set()
        self._under_way: deque[tuple[float, int, bool]] = deque()

    def note(self, now_s: float, block: int, held: bool) -> None:
        """Sends a change."""
        self._under_way.append((now_s + self._delay_s, block, held))

    def hit_tokens(self, now_s: float, blocks: Sequence[int], prompt_tokens: int) -> int:
        """Like `PrefixCache.hit_tokens`, after the changes that have arrived."""
        while self._under_way and self._under_way[0][0] <= now_s:
            _, block, held = self._under_way.popleft()
            (self._held.add if held else self._held.discard)(block)
        return hit_tokens(self._held, blocks, prompt_tokens, self._block_tokens)


def hit_tokens(held: Container[int], blocks: Sequence[int], prompt_tokens: int, block_tokens: int) -> int:
    """Tokens of a prompt's longest leading run of held blocks, less than the whole prompt."""
    count = 0
    for block in blocks:
        if block not in held:
            break
        count += 1
    return min(count * block_tokens, prompt_tokens - 1)
