"""A model's executor that fails at one prompt, as a device does that is lost: the engine core ends."""

from __future__ import annotations

from typing import Any

from bench.sleeping_executor import SleepingExecutor

FATAL = 17
"""The first token of the prompt that it does not survive."""


class FailingExecutor(SleepingExecutor):
    """Sleeps for each step, and raises at a prompt that begins with `FATAL`."""

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """One step."""
        for new in scheduler_output.scheduled_new_reqs:
            if new.prompt_token_ids and new.prompt_token_ids[0] == FATAL:
                raise RuntimeError("the device is lost")
        return super().execute_model(scheduler_output, non_block)
