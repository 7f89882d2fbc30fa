"""The bodies of requests, made before the load begins: a generator that encodes while it sends is late.

A prompt is made of blocks, as in the traces: equal block ids have equal tokens, within one play. Another play has
other tokens, so that nothing of it is in a prefix cache.
"""

from __future__ import annotations

import json

import numpy as np

from dpshm.sim.workloads.traces import Arrival

TOKENS = np.array([str(token) for token in range(5, 1000)], dtype=object)


class Prompts:
    """Makes the bodies of one play.

    Args:
        seed: of the play: words and numbers that no other play on the same server has.
        block_tokens: prompt tokens that a block id is for.
    """

    def __init__(self, seed: str, block_tokens: int) -> None:
        self._seed = seed
        self._block_tokens = block_tokens
        self._blocks: dict[int, str] = {}

    def body(self, number: int, arrival: Arrival) -> bytes:
        """The body of the request of that number."""
        parts = []
        left = arrival.prompt_tokens
        for block in arrival.block_hashes:
            if left < self._block_tokens:
                break
            if block not in self._blocks:
                self._blocks[block] = _drawn(f"{self._seed} block {block}", self._block_tokens)
            parts.append(self._blocks[block])
            left -= self._block_tokens
        if left:
            parts.append(_drawn(f"{self._seed} request {number}", left))
        sampling = {"max_tokens": arrival.output_tokens, "ignore_eos": True, "detokenize": False}
        rest = json.dumps({"stream": True, "sampling_params": sampling})
        return f'{{"token_ids": [{",".join(parts)}], {rest[1:]}'.encode()


def trace_lines(arrivals: list[Arrival], block_tokens: int) -> list[str]:
    """The same requests as a trace that the laboratory and the demo replay: JSON lines with block ids.

    Prompt tokens that no block id is for get ids of their own: a prompt has as many as its length asks.
    """
    lines = []
    fresh = 1 + max((block for a in arrivals for block in a.block_hashes), default=0)
    for arrival in arrivals:
        missing = -(-arrival.prompt_tokens // block_tokens) - len(arrival.block_hashes)
        ids = [*arrival.block_hashes, *range(fresh, fresh + missing)]
        fresh += missing
        record = {
            "timestamp": round(arrival.time_s * 1e3),
            "input_length": arrival.prompt_tokens,
            "output_length": arrival.output_tokens,
            "hash_ids": ids,
        }
        lines.append(json.dumps(record))
    return lines


def _drawn(seed: str, count: int) -> str:
    return ",".join(np.random.default_rng(list(seed.encode())).choice(TOKENS, count))
