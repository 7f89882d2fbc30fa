"""``python -m bench vllm-cache``: what the prefix index costs in a real vLLM, in CPU time of one thread.

The engine's part: vLLM's own KV-cache manager stores prompts and evicts others for them, with the plugin's hooks
and without, in turn. Counted is what the hooks add for a block that enters and one that leaves, until the index
shows both.
The API server's part: a prompt is hashed and looked up in the indexes of 8 ranks, which hold half of it to nearly
all, where its hashes and its last matches are known (warm), where the hashes alone are, where neither is, and
where no rank has any of it. It is looked up as `route` does it, with what was just sent. vLLM's own hashing of the
prompt, which its engine does, stands beside it.

Needs the environment of ``tests/e2e/vllm/environment.py``, in whose interpreter it runs. Without that it says so
and exits with 2.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from bench.in_vllm import run_in_vllm

RANKS = 8
PROMPT_TOKENS = 6400
BLOCKS = 2000
"""Of the pool. It holds five prompts, so each that comes evicts another."""


def main(argv: list[str]) -> int:
    """Runs what the command line says; gives the exit status."""
    parser = argparse.ArgumentParser("python -m bench vllm-cache", description=str(__doc__).split("\n\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args(argv)
    if (status := run_in_vllm("vllm-cache", argv)) is not None:
        return status
    _engine(options.rounds)
    for tokens in (4096, 32_768):
        _api_server(tokens, options.rounds)
    sys.stdout.flush()
    os._exit(0)  # the libraries under vLLM print pages about what they leak


def _took(call: Callable[[], object]) -> float:
    """CPU time of this thread, in microseconds."""
    began = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - began) / 1e3


class _Scheduler:
    """Serves one prompt a step."""

    def __init__(self, manager: Any) -> None:
        self.kv_cache_manager = manager

    def schedule(self, request: Any) -> None:
        """Stores a prompt, and frees its blocks."""
        manager = self.kv_cache_manager
        computed, hit = manager.get_computed_blocks(request)[:2]
        assert manager.allocate_slots(request, PROMPT_TOKENS - hit, hit, computed) is not None
        manager.free(request)


def _engine(rounds: int) -> None:
    from dpshm import Coordinator
    from dpshm.engine.row import EngineRow

    real: Any = import_module("tests.e2e.vllm.real_cache")
    utils: Any = import_module("vllm.v1.core.kv_cache_utils")
    prefix_cache: Any = import_module("dpshm.vllm.prefix_cache").PrefixCache
    function = import_module("vllm.utils.hashing").get_hash_fn_by_name(real.ALGORITHM)
    utils.init_none_hash(function)
    hasher = utils.get_request_block_hasher(real.BLOCK, function)
    manager, rng = real.manager("full", BLOCKS), random.Random(1)
    blocks = PROMPT_TOKENS // real.BLOCK

    def prompt(number: int) -> Any:
        tokens = [rng.randrange(150_000) for _ in range(PROMPT_TOKENS)]
        sent = real.request(number, tokens, None, None)
        return import_module("vllm.v1.request").Request.from_engine_core_request(sent, hasher)

    scheduler = _Scheduler(manager)
    for number in range(10):
        scheduler.schedule(prompt(number))
    figures: dict[bool, list[float]] = {False: [], True: []}
    group = f"bench-cache-{os.getpid()}"
    with Coordinator(group=group, dp_size=1, waves=False), EngineRow.attach(group, 0) as row:
        for number in range(rounds):
            for hooked in (True, False) if number % 2 else (False, True):
                hooks = prefix_cache.open(row, scheduler, 0) if hooked else None
                scheduler.schedule(prompt(number))  # the caches of the processor are warm
                request = prompt(number)
                figures[hooked].append(_took(partial(scheduler.schedule, request)))
                if hooks is not None:
                    assert hooks.cache.index._evicted >= blocks, "nothing was evicted"  # noqa: SLF001
                    hooks.close()
                    hooks.cache.close()
    per_block = sorted((ours - theirs) / blocks for theirs, ours in zip(*figures.values(), strict=True))
    low, middle, high = (per_block[len(per_block) * i // 4] for i in (1, 2, 3))
    without = statistics.median(figures[False]) / blocks
    print(
        f"engine, a block that enters and one that leaves: the hooks add {middle:.2f} us (quartiles {low:.2f} to "
        f"{high:.2f}) to vLLM's {without:.2f} us; {_load()}"
    )


def _api_server(tokens: int, rounds: int) -> None:
    from dpshm import Coordinator
    from dpshm.engine.row import EngineRow
    from dpshm.frontend.last_matches import LastMatches
    from dpshm.frontend.prefix_reader import PrefixReader
    from dpshm.rules.prefix_hash import DigestReducer

    real: Any = import_module("tests.e2e.vllm.real_cache")
    hashes: Any = import_module("dpshm.vllm.block_hashes")
    utils: Any = import_module("vllm.v1.core.kv_cache_utils")
    config = SimpleNamespace(enable_prefix_caching=True, prefix_caching_hash_algo=real.ALGORITHM)
    client = SimpleNamespace(client_index=0, vllm_config=SimpleNamespace(cache_config=config))
    prompts = real.PromptHasher(client)
    hasher = utils.get_request_block_hasher(real.BLOCK, prompts._function)  # noqa: SLF001
    make, rng = import_module("vllm.v1.request").Request.from_engine_core_request, random.Random(2)

    def request() -> Any:
        return real.request(1, [rng.randrange(150_000) for _ in range(tokens)], None, None)

    shared = request()
    digests = make(shared, hasher).block_hashes
    with ExitStack() as stack:
        group = f"bench-cache-{os.getpid()}-{tokens}"
        stack.enter_context(Coordinator(group=group, dp_size=RANKS, waves=False))
        for rank in range(RANKS):
            row = stack.enter_context(EngineRow.attach(group, rank))
            key = row.board.segment.header.prefix_key
            identity = hashes.identity_of(key, real.BLOCK, real.BLOCK, hashes.first_of_engine())
            reducer = DigestReducer(key)
            held = digests[: len(digests) * (8 + rank) // 16]
            row.open_cache(70_000, real.BLOCK, identity=identity).insert(map(reducer.fingerprint, held))
        prefixes = PrefixReader(row.board, 0)
        prefixes.refresh(time.monotonic_ns(), 0)

        def look_up(given: Any) -> None:
            prefixes.look_up(prompts.prompt(given, tokens), tokens, time.monotonic_ns())

        def forget_matches() -> Any:
            prefixes._last = LastMatches()  # noqa: SLF001
            return shared

        def forget() -> Any:
            prompts._ways.clear()  # noqa: SLF001
            prompts.of_index(real.BLOCK, identity, key)
            return forget_matches()

        arms: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
            "nothing known": (forget, look_up),
            "warm": (lambda: shared, look_up),
            "hashes known, not the matches": (forget_matches, look_up),
            "no rank has it": (request, look_up),
            "vLLM's own hashes": (lambda: shared, lambda given: make(given, hasher)),
        }
        figures: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(rounds):
            for arm, (before, call) in arms.items():
                times = [_took(partial(call, before())) for _ in range(3)]
                figures[arm].append(times[-1])  # the processor's caches are warm
    shown = ", ".join(
        f"{arm} {sorted(times)[len(times) // 4]:.0f} ({min(times):.0f})" for arm, times in figures.items()
    )
    print(f"API server, {tokens} tokens, us, lower quartile (least): {shown}; {_load()}")


def _load() -> str:
    return f"load average {os.getloadavg()[0]:.1f}"
