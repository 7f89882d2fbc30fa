"""The executor that only sleeps, in an engine that refuses requests: those whose prompts begin with `REFUSED`.

A request whose preprocessing in the engine raises is answered with an error by vLLM, and the scheduler never sees
it. What raises there by itself needs a tokenizer or a multimodal model, so here vLLM's preprocessing is made to
raise; all that follows is vLLM's. The engines import this module with the executor's name.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.engine.core import EngineCoreProc

from bench.sleeping_executor import SleepingExecutor

REFUSED = 13
_stock = EngineCoreProc.preprocess_add_request


def _preprocess_add_request(core: Any, request: Any) -> Any:
    if request.prompt_token_ids[0] == REFUSED:
        raise ValueError("refused, as the test ordered")
    return _stock(core, request)


EngineCoreProc.preprocess_add_request = _preprocess_add_request


class RefusingExecutor(SleepingExecutor):
    """The same; importing this module is what counts."""
