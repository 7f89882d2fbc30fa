"""Prints the tokens that a fixed set of requests is answered, as JSON; run by test_torch_engine.py.

``torch_tokens.py 1`` computes them in several ways, ``torch_tokens.py 2`` in one, by two ranks, each a process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REQUESTS = [(40, 30), (45, 30), (3, 12), (90, 6), (33, 8), (1, 2)]
"""Prompt and output tokens."""
WAYS: dict[str, dict[str, int]] = {
    "plain": {},
    "in chunks": {"max_step_tokens": 7},
    "one by one": {"max_running": 1},
    "with preemptions": {"kv_tokens": 97},
}


def main() -> None:
    """Of the whole, or of one rank of it."""
    ranks = int(sys.argv[1])
    if len(sys.argv) > 2:
        print(json.dumps(generate(ranks, int(sys.argv[2]), sys.argv[3])))
        return
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            subprocess.Popen(
                [sys.executable, sys.argv[0], str(ranks), str(rank), store], stdout=subprocess.PIPE, text=True
            )
            for rank in range(ranks)
        ]
        outs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes)
    answers: dict[str, dict[str, Any]] = {}
    for out in outs:
        for way, tokens in json.loads(out.splitlines()[-1]).items():
            answers.setdefault(way, {}).update(tokens)
    print(json.dumps(answers))


def generate(ranks: int, rank: int, store: str) -> dict[str, dict[str, list[int]]]:
    """By way, what one rank's share of the requests is answered."""
    from dpshm.sim.torch.engine import TorchAccelerator
    from dpshm.sim.torch.ranks import Ranks

    accelerator = TorchAccelerator(Ranks(store, rank, ranks))
    ways = WAYS if ranks == 1 else {"plain": {}}
    answers = {way: compute(accelerator, ranks, rank, **limits) for way, limits in ways.items()}
    accelerator.close()
    return answers


def compute(accelerator: Any, ranks: int, rank: int, **limits: int) -> dict[str, list[int]]:
    """Until all ranks agree that they are idle."""
    from dpshm.sim.batching import Batcher, SimRequest

    batcher = Batcher(accelerator.cost._replace(**limits))
    mine = {n: tokens for n, tokens in enumerate(REQUESTS) if n % ranks == rank}
    for number, (prompt_tokens, output_tokens) in mine.items():
        batcher.add(SimRequest((1, number), prompt_tokens, output_tokens))
    answers: dict[str, list[int]] = {}
    all_idle = False
    while not all_idle:
        step = batcher.plan()
        all_idle = bool(accelerator.compute(batcher, step, lambda: False))
        for request, token in accelerator.tokens:
            answers.setdefault(str(request.key[1]), []).append(token)
        batcher.finish(step)
    assert bool(batcher.preemptions) == ("kv_tokens" in limits)
    assert {n: len(tokens) for n, tokens in answers.items()} == {str(n): output for n, (_, output) in mine.items()}
    return answers


if __name__ == "__main__":
    main()
