"""vLLM's hashes of prompt blocks: which kind an engine uses, and whether an API server can make the same.

A block's hash covers its prefix, and what its tokens alone do not tell: adapter, multimodal content, cache salt.
The chain begins with a value that vLLM derives from a seed, ``NONE_HASH``. The seed is the same in every process
for sha256 (in 0.32 and 0.33), and where PYTHONHASHSEED is set. Otherwise it is random in each process, so no other
process can make an engine's hashes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from hashlib import blake2b
from importlib import import_module
from types import SimpleNamespace
from typing import Any


def identity_of(key: int, block_tokens: int, hash_tokens: int, first: bytes) -> int:
    """The identity of a rank's hashes, for the header of its index: 63 bits.

    Args:
        key: the group's secret.
        block_tokens: tokens a block of the index.
        hash_tokens: tokens a block of vLLM's hashes; some of them make a block of the index.
        first: the value with which the chain of hashes begins; it differs by function and seed.
    """
    data = f"vllm-1:{block_tokens}:{hash_tokens}:".encode() + first
    return int.from_bytes(blake2b(data, key=key.to_bytes(8, "little"), digest_size=8).digest(), "little") >> 1


def first_of_engine() -> bytes:
    """The value with which the engine of this process begins its chains."""
    return bytes(import_module("vllm.v1.core.kv_cache_utils").NONE_HASH)


def first_of_any_engine(function: Callable[[Any], bytes]) -> bytes | None:
    """The value with which each engine of the deployment begins its chains; None if each has one of its own.

    vLLM's functions need it in this process too, so it is set where it is missing.
    """
    utils = import_module("vllm.v1.core.kv_cache_utils")
    if not hasattr(utils, "NONE_HASH"):
        seed = getattr(utils, "resolve_none_hash_seed", None)  # in releases that had none all seeds are random
        if os.getenv("PYTHONHASHSEED") is None and (seed is None or seed(function) != seed(function)):
            return None
        utils.init_none_hash(function)
    return bytes(utils.NONE_HASH)


def chain(
    function: Callable[[Any], bytes], parent: bytes, tokens: Sequence[int], block_tokens: int
) -> list[bytes]:
    """The hashes of blocks that hold tokens alone, in two thirds of the time of vLLM's hasher.

    vLLM hashes a block as its parent's hash, its tokens as a tuple, and what else it depends on, here nothing.

    Args:
        function: vLLM's hash function.
        parent: the hash of the block before; `first_of_any_engine` before the first.
        tokens: of the blocks; a rest that fills no block is left out.
        block_tokens: tokens a block.
    """
    made = []
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        parent = function((parent, tuple(tokens[end - block_tokens : end]), None))
        made.append(parent)
    return made


def chain_is_right(function: Callable[[Any], bytes], first: bytes, hasher: Callable[[Any], list[bytes]]) -> bool:
    """Whether `chain` makes what a hasher of vLLM for blocks of one token makes."""
    tokens = [7, 1 << 20, 7]
    probe = SimpleNamespace(
        all_token_ids=tokens,
        num_tokens=len(tokens),
        block_hashes=[],
        mm_features=[],
        lora_request=None,
        cache_salt=None,
        prompt_embeds=None,
    )
    return chain(function, first, tokens, 1) == list(hasher(probe))
