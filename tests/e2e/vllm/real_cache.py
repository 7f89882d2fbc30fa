"""vLLM's own KV-cache manager and requests beside the prefix index, in one process and without a server.

    python -m tests.e2e.vllm.real_cache GROUP KIND REQUESTS BLOCKS

Each request is looked up as an API server does it, and then given to vLLM's manager as the scheduler does it.
With few blocks the manager evicts all the time. Prints a line of JSON: requests; of these, whose match equals
the hit, and whose match covers it; tokens that were hits; blocks that were evicted; blocks in the index after a
reset.
"""

from __future__ import annotations

import inspect
import json
import random
import sys
from types import SimpleNamespace
from typing import Any

import torch
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request

from dpshm import Coordinator, Frontend
from dpshm.board.prefix_file import index_path
from dpshm.board.prefix_index import PrefixIndexReader
from dpshm.engine.row import EngineRow
from dpshm.vllm.prefix_cache import PrefixCache
from dpshm.vllm.prompts import PromptHasher

ALGORITHM = "sha256"
BLOCK = 16
ADAPTER = LoRARequest("adapter", 1, "/nowhere")


def manager(kind: str, blocks: int) -> Any:
    """A cache manager.

    Args:
        kind: "full", of a model with full attention; "eagle", of one with speculative decoding that computes the
            last cached block again; "hybrid", of one with a sliding window too.
        blocks: how many it has.
    """
    full = BLOCK
    groups = []
    if kind == "hybrid":  # pages are as large in both: a block of full attention has twice the tokens
        full = 2 * BLOCK
        window = SlidingWindowSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=2, dtype=torch.float32, sliding_window=4 * BLOCK
        )
        groups.append(KVCacheGroupSpec(["window"], window))
    spec = FullAttentionSpec(block_size=full, num_kv_heads=1, head_size=1, dtype=torch.float32)
    groups.append(KVCacheGroupSpec(["full"], spec))
    config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    sizes = {"hash_block_size": BLOCK, "scheduler_block_size": full, "max_in_flight_tokens": 8192}
    sizes["use_eagle"] = kind == "eagle"
    known = inspect.signature(KVCacheManager).parameters  # releases differ
    wanted = {name: size for name, size in sizes.items() if name in known}
    return KVCacheManager(config, max_model_len=40_000, enable_caching=True, **wanted)


def request(number: int, tokens: list[int], adapter: LoRARequest | None, salt: str | None) -> EngineCoreRequest:
    """A request as an API server sends it."""
    return EngineCoreRequest(
        request_id=str(number),
        prompt_token_ids=tokens,
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=adapter,
        cache_salt=salt,
        data_parallel_rank=None,
    )


class _Scheduler:
    """Schedules one request a step."""

    def __init__(self, cache: Any) -> None:
        self.kv_cache_manager = cache

    def schedule(self, received: Request, hit: int, computed: Any) -> None:
        """Gives a request its blocks."""
        new = received.num_prompt_tokens - hit
        assert self.kv_cache_manager.allocate_slots(received, new, hit, computed) is not None


def main(group: str, kind: str, requests: int, blocks: int) -> None:
    """Compares; prints the result."""
    config = SimpleNamespace(enable_prefix_caching=True, prefix_caching_hash_algo=ALGORITHM)
    client = SimpleNamespace(client_index=0, vllm_config=SimpleNamespace(cache_config=config))
    prompts = PromptHasher(client)  # before the engine's part, which sets the seed in this process too
    assert prompts.works
    function = get_hash_fn_by_name(ALGORITHM)
    kv_cache_utils.init_none_hash(function)
    hasher = kv_cache_utils.get_request_block_hasher(BLOCK, function)
    cache, rng = manager(kind, blocks), random.Random(1)
    with (
        Coordinator(group=group, dp_size=1),
        EngineRow.attach(group, 0) as row,
        Frontend.attach(group) as frontend,
    ):
        scheduler = _Scheduler(cache)
        prefix = PrefixCache.open(row, scheduler, 0)
        assert prefix is not None
        known = [[rng.randrange(50_000) for _ in range(500)]]
        equal = covered = hits = 0
        for number in range(requests):
            tokens = rng.choice(known[-30:])[: rng.randrange(1, 6000)]
            tokens = tokens + [rng.randrange(50_000) for _ in range(rng.randrange(200))]
            known.append(tokens)
            sent = request(number, tokens, rng.choice([None, None, ADAPTER]), rng.choice([None, None, "salt"]))
            prompt = prompts.prompt(sent, len(tokens))
            assert prompt is not None
            expected = frontend.cached(prompt)[0]
            received = Request.from_engine_core_request(sent, hasher)
            computed, hit = cache.get_computed_blocks(received)[:2]
            equal += expected == hit
            covered += expected >= hit
            hits += hit
            scheduler.schedule(received, hit, computed)
            cache.free(received)
        reader = PrefixIndexReader.open(index_path(row.board.segment.sockets_path, 0))
        prefix.show()
        evicted = reader.counters()["evicted"]
        assert cache.reset_prefix_cache()
        held = reader.counters()["held"]
        found = {"equal": equal, "covered": covered, "hits": hits, "evicted": evicted, "held": held}
        print(json.dumps({"requests": requests} | found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
