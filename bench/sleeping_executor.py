"""A vLLM executor without a model: a step takes the time that one would take, and gives one token a request.

The engine core, the scheduler, the KV-cache manager, the lockstep all-reduce, the waves and the sockets are
vLLM's own; only the model is missing, so a whole deployment runs on two cores without a GPU. For

    vllm serve ... --distributed-executor-backend bench.sleeping_executor.SleepingExecutor --no-async-scheduling

A step takes ``base + per_prompt_token * prompt tokens + per_request * requests + per_held_token * held tokens``.
Held tokens are the context of the step's requests, which attention reads. The laboratory has the same formula, and
`dpshm.sim.step_cost` says where its figures come from. Environment variables:

- ``SLEEPER_STEP_MS``: ``base,per_prompt_token,per_request,per_held_token`` in milliseconds (4,0.02,0.05,0); the
  last may be left out;
- ``SLEEPER_KV_BYTES``: the size of the KV cache that is pretended;
- ``SLEEPER_LOCKSTEP``: ``host:port``; the ranks take each step together, and it is as long as the longest of them,
  as the all-to-all of a mixture of experts makes it. For such models alone, whose ranks all step while one does;
- ``SLEEPER_LOG``: a folder; each step adds a line to its file ``rank-N``: when it was entered (CLOCK_MONOTONIC),
  how long it waited for the other ranks, how long it slept (all in seconds), requests, prompt tokens, held tokens.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput

TOKEN = 7


class SleepingExecutor(Executor):
    """Sleeps for each step. Answers whatever the engine core asks of an executor."""

    uses_ray = False
    supports_pp = False

    def _init_executor(self) -> None:
        costs = [float(cost) / 1e3 for cost in os.environ.get("SLEEPER_STEP_MS", "4,0.02,0.05,0").split(",")]
        self._base_s, self._per_prompt_token_s, self._per_request_s, self._per_held_token_s = [*costs, 0.0][:4]
        self._left: dict[str, int] = {}  # prompt tokens not computed, by request
        parallel = self.vllm_config.parallel_config
        rank = getattr(parallel, "data_parallel_index", None)
        rank = parallel.data_parallel_rank if rank is None else rank
        self._log = self._ranks = None
        if folder := os.environ.get("SLEEPER_LOG"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._log = os.open(Path(folder, f"rank-{rank}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        if (address := os.environ.get("SLEEPER_LOCKSTEP")) and parallel.data_parallel_size > 1:
            self._ranks = _join(address, parallel.data_parallel_rank, parallel.data_parallel_size)

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """One step: sleeps, then gives a token to each request whose prompt is computed."""
        prompt_tokens = held_tokens = 0
        for new in scheduler_output.scheduled_new_reqs:
            prompt = new.prompt_token_ids if new.prompt_token_ids is not None else new.prompt_embeds
            self._left[new.req_id] = len(prompt) - new.num_computed_tokens
            held_tokens += new.num_computed_tokens
        resumed = scheduler_output.scheduled_cached_reqs
        for req_id, computed in zip(resumed.req_ids, resumed.num_computed_tokens, strict=True):
            held_tokens += computed
            if req_id in resumed.resumed_req_ids:
                scheduled = scheduler_output.num_scheduled_tokens[req_id]
                self._left[req_id] = max(scheduled, self._left.get(req_id, 0)) if computed == 0 else scheduled
        req_ids, tokens = [], []
        for req_id, scheduled in scheduler_output.num_scheduled_tokens.items():
            left = self._left.get(req_id, 0)
            prompt_tokens += min(left, scheduled)
            self._left[req_id] = left = max(0, left - scheduled)
            req_ids.append(req_id)
            tokens.append([] if left else [TOKEN])
        for req_id in scheduler_output.finished_req_ids:
            self._left.pop(req_id, None)
        if req_ids:
            self._step(len(req_ids), prompt_tokens, held_tokens)
        output = ModelRunnerOutput(req_ids, {r: i for i, r in enumerate(req_ids)}, tokens)
        if not non_block:
            return output
        future: Future[Any] = Future()
        future.set_result(output)
        return future

    def execute_dummy_batch(self) -> None:
        """A step without requests."""
        self._step(0, 0, 0)

    def _step(self, requests: int, prompt_tokens: int, held_tokens: int) -> None:
        entered = time.monotonic()
        seconds = (
            self._base_s
            + prompt_tokens * self._per_prompt_token_s
            + requests * self._per_request_s
            + held_tokens * self._per_held_token_s
        )
        if self._ranks is not None:
            longest = torch.tensor([seconds], dtype=torch.float64)
            torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX, group=self._ranks)
            seconds = float(longest[0])
        waited = time.monotonic() - entered
        time.sleep(seconds)
        if self._log is not None:
            line = f"{entered:.6f} {waited:.6f} {seconds:.6f} {requests} {prompt_tokens} {held_tokens}\n"
            os.write(self._log, line.encode())

    def collective_rpc(
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        """What the one worker would answer; None to whatever needs no answer."""
        answers = {
            "get_supported_kv_cache_layouts": ["NHD"],
            "determine_available_memory": int(os.environ.get("SLEEPER_KV_BYTES", str(256 << 20))),
            "get_supported_tasks": ("generate",),
            "add_lora": True,
            "supports_draft_weight_updates": False,
        }
        if method == "get_kv_cache_spec":
            return [self._spec()]
        return [answers.get(method)]

    def compile_or_warm_up_model(self) -> None:
        """Nothing to compile."""

    def _spec(self) -> dict[str, FullAttentionSpec]:
        layer = FullAttentionSpec(
            block_size=self.cache_config.block_size or 16, num_kv_heads=2, head_size=64, dtype=torch.float32
        )
        return {"layers.0": layer}

    def check_health(self) -> None:
        """Always well."""

    def shutdown(self) -> None:
        """Nothing to end."""


def _join(address: str, rank: int, size: int) -> Any:
    """The group in which the ranks agree how long a step is."""
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group

    host, port = address.rsplit(":", 1)
    return stateless_init_torch_distributed_process_group(host, int(port), rank, size, backend="gloo")
