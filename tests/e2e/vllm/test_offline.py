"""`AsyncLLM` without a server, with data parallelism: a user's program, in vLLM's environment."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from dpshm.board import files
from tests.e2e.vllm import environment
from tests.e2e.vllm.server import ENVIRONMENT, MODELS, SIZES

PROGRAM = """
import asyncio, os, sys
if __name__ == "__main__" and os.environ.get("DPSHM_TEST_FORK") == "1":
    from tests.e2e.vllm.forked import fork
    fork()
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

SLEEPER = "bench.sleeping_executor.SleepingExecutor"

async def one(llm, number):
    sampling = SamplingParams(max_tokens=1 + number % 7, ignore_eos=True, detokenize=False)
    async for output in llm.generate({"prompt_token_ids": [5, 6, number]}, sampling, f"r{number}"):
        last = output
    return len(last.outputs[0].token_ids)

async def main():
    asynchronous = sys.argv[2] == "asynchronous"
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=sys.argv[1], load_format="dummy", dtype="float32", skip_tokenizer_init=True, enforce_eager=True,
            max_model_len=2048, max_num_seqs=32, data_parallel_size=2, async_scheduling=asynchronous,
            distributed_executor_backend=None if asynchronous else SLEEPER,
        )
    )
    try:
        lengths = await asyncio.gather(*(one(llm, number) for number in range(48)))
        assert lengths == [1 + number % 7 for number in range(48)], lengths
        from dpshm import Board
        from dpshm.vllm.find import group_at
        with Board.attach(group_at(llm.engine_core.stats_update_address)) as board:
            print("by rank", *board.sent_requests[:, :2].sum(axis=0).tolist(), flush=True)
    finally:
        llm.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("model", "scheduling"), [("dense", "synchronous"), ("dense", "asynchronous"), ("moe", "synchronous")]
)
def test_a_program_with_an_async_engine_uses_the_board(tmp_path, model, scheduling):
    """Guards against a plugin that only a server has, and one that leaves something behind with a program."""
    if scheduling == "asynchronous" and not environment.computes():
        pytest.skip(
            "the executor that sleeps has no asynchronous scheduling, and this release computes nothing here"
        )
    (tmp_path / "config.json").write_text(json.dumps(SIZES | MODELS[model]))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    before = set(files.groups())
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("DPSHM", "VLLM"))} | ENVIRONMENT
    environ |= {k: v for k, v in os.environ.items() if k == "DPSHM_TEST_FORK"}
    done = subprocess.run(
        [environment.folder() / "bin" / "python", program, tmp_path, scheduling],
        env=environ,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert done.stdout.count("chooses by the board") == 1, done.stdout[-8000:]
    by_rank = [int(n) for n in done.stdout.partition("by rank")[2].split()[:2]]
    assert sum(by_rank) == 48
    assert min(by_rank) >= 12, by_rank
    assert set(files.groups()) <= before
