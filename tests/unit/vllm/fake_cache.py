"""Fakes of vLLM's KV cache: block pool, prefix cache, hashes of blocks.

The fakes keep what the plugin relies on: the pool's map, through which every block enters and leaves the cache,
its keys, and the hasher that engines and API servers share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

BLOCK_TOKENS = 4
SEED = b"the same in every process"


def hash_function(data: object) -> bytes:
    """``vllm.utils.hashing.sha256``."""
    return sha256(repr(data).encode()).digest()


def request_block_hasher(size: int, function: Callable[[object], bytes]) -> Callable[[Any], list[bytes]]:
    """``get_request_block_hasher``: hashes what a request's `block_hashes` lack."""

    def hasher(request: Any) -> list[bytes]:
        made: list[bytes] = []
        last = request.block_hashes[-1] if request.block_hashes else function(SEED)
        for start in range(len(request.block_hashes) * size, request.num_tokens - size + 1, size):
            tokens = tuple(request.all_token_ids[start : start + size])
            extra = (request.lora_request, request.cache_salt if start == 0 else None)
            last = function((last, tokens, extra if any(extra) else None))
            made.append(last)
        return made

    return hasher


class Block:
    """``KVCacheBlock``."""

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.block_hash: bytes | None = None


class BlockHashToBlockMap:
    """One block or several for each key."""

    def __init__(self) -> None:
        self._cache: dict[bytes, Block | dict[int, Block]] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._cache

    def insert(self, key: bytes, block: Block) -> None:
        """A block has this content."""
        held = self._cache.get(key)
        if held is None:
            self._cache[key] = block
        elif isinstance(held, Block):
            self._cache[key] = {held.block_id: held, block.block_id: block}
        else:
            held[block.block_id] = block

    def pop(self, key: bytes, block_id: int) -> Block | None:
        """A block has it no more."""
        held = self._cache.pop(key, None)
        if held is None:
            return None
        if isinstance(held, Block):
            if held.block_id == block_id:
                return held
            self._cache[key] = held
            return None
        block = held.pop(block_id, None)
        if held:
            self._cache[key] = held
        return block


class BlockPool:
    """Blocks, the oldest free one first."""

    def __init__(self, num_gpu_blocks: int = 65, enable_caching: bool = True) -> None:
        self.num_gpu_blocks = num_gpu_blocks
        self.enable_caching = enable_caching
        self.hash_block_size = BLOCK_TOKENS
        self.free = [Block(i) for i in range(1, num_gpu_blocks)]
        self.cached_block_hash_to_block = BlockHashToBlockMap()

    def get_num_free_blocks(self) -> int:
        """How many no request holds."""
        return len(self.free)

    def take(self, key: bytes) -> Block:
        """A block with new content, from the oldest free one, which leaves the cache."""
        block = self.free.pop(0)
        if block.block_hash is not None:
            self.cached_block_hash_to_block.pop(block.block_hash, block.block_id)
        block.block_hash = key
        self.cached_block_hash_to_block.insert(key, block)
        return block

    def reset_prefix_cache(self) -> bool:
        """Forgets all, unless a block is in use."""
        if len(self.free) != self.num_gpu_blocks - 1:
            return False
        self.cached_block_hash_to_block = BlockHashToBlockMap()
        for block in self.free:
            block.block_hash = None
        return True


class FullAttentionManager:
    """A KV cache group with full attention."""

    def __init__(self, block_pool: BlockPool, group: int = 0) -> None:
        self.block_pool = block_pool
        self.block_size = BLOCK_TOKENS
        self.group = group.to_bytes(4, "big")
        self.use_eagle = False
        self._held: dict[str, list[Block]] = {}
        self._hasher = request_block_hasher(BLOCK_TOKENS, hash_function)

    def hit(self, request: Any) -> int:
        """Leading tokens that are cached, less the last; with EAGLE also less the last block."""
        request.all_token_ids, request.num_tokens = request.prompt_token_ids, request.num_prompt_tokens
        request.block_hashes = []
        request.block_hashes = self._hasher(request)
        found = 0
        for block_hash in request.block_hashes[: (request.num_tokens - 1) // BLOCK_TOKENS]:
            if block_hash + self.group not in self.block_pool.cached_block_hash_to_block:
                break
            found += BLOCK_TOKENS
        return max(0, found - BLOCK_TOKENS) if self.use_eagle else found

    def computed(self, request: Any) -> None:
        """The prompt is computed: its blocks are in the cache. What was found there is there twice."""
        keys = [block_hash + self.group for block_hash in request.block_hashes]
        self._held[request.request_id] = [self.block_pool.take(key) for key in keys]

    def end(self, request_id: str) -> None:
        """A request ended: its blocks are free, the ends first, and stay cached."""
        self.block_pool.free += reversed(self._held.pop(request_id, []))


class SlidingWindowManager(FullAttentionManager):
    """A KV cache group of another kind."""


def kv_cache_manager(pool: BlockPool, managers: Iterable[object] | None = None) -> SimpleNamespace:
    """``KVCacheManager`` with these groups; one with full attention by default."""
    groups = [FullAttentionManager(pool)] if managers is None else list(managers)
    return SimpleNamespace(block_pool=pool, coordinator=SimpleNamespace(single_type_managers=groups))
