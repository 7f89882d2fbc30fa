"""Times an engine's steps, and stores what a step tells: when it began, counters, and the step model.

`StepTimer` writes three places of the engine's row: ``step_start``, the counters from ``steps`` on, and
``step_model``. It is one object for all steps of an engine, because steps do not overlap.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import NamedTuple, Self

from dpshm.board.words import MAX_PROMPT_TOKENS
from dpshm.policies.step_model import HELD_TOKENS, StepModel


class StepOffsets(NamedTuple):
    """Where a `StepTimer` writes: the index in the board's words of the first word of each place."""

    step_start: int
    counters: int  # steps, dummy steps, busy ns, prompt tokens, generation tokens
    model: int


def fitting(prefill_tokens: int, batch: int, held_tokens: int) -> tuple[int, int, int]:
    """What a step is told, as ints that no sum of words overflows with."""
    # int: numpy's narrow integers would overflow.
    each = int(prefill_tokens), int(batch), int(held_tokens)
    if min(each) < 0 or max(each) > MAX_PROMPT_TOKENS:
        prefill_tokens, batch, held_tokens = (max(0, min(value, MAX_PROMPT_TOKENS)) for value in each)
        return prefill_tokens, batch, held_tokens
    return each


class StepTimer:
    """A context that times one step; see `EngineRow.step`.

    Attributes:
        prefill_tokens: prompt tokens that the step computes; may be set until the step ends. What does not fit
            saturates: 0 to 2**31 - 1, as the next two.
        batch: requests that get a token from it; likewise.
        held_tokens: tokens of context of the running requests, computed or cached: when it begins. May be set anew
            when it ends, for front-ends.
        unreported: a step ended, and `report` was not called since.
    """

    def __init__(self, words: memoryview, offsets: StepOffsets) -> None:
        self._words = words
        self._at_step_start, self._at_counters, self._at_model = offsets
        self._model = StepModel()
        self._counters = [0] * 5
        self._learnt: list[int] = []  # as stored
        self._started_ns = 0
        self.prefill_tokens = 0
        self.batch = 0
        self.held_tokens = self._held_at_start = 0
        self.unreported = False

    def __enter__(self) -> Self:
        words, at, model = self._words, self._at_model, self._model
        now_ns = words[self._at_step_start] = self._started_ns = time.monotonic_ns()
        self._held_at_start = self.held_tokens
        model.begin(now_ns, self.prefill_tokens, self.batch, self.held_tokens)
        words[at], words[at + 1], words[at + 2] = model.words[:3]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        duration_ns = time.monotonic_ns() - self._started_ns
        prefill_tokens, batch, held_tokens = fitting(self.prefill_tokens, self.batch, self.held_tokens)
        words, at, counters = self._words, self._at_counters, self._counters
        words[at] = counters[0] = counters[0] + 1
        if not prefill_tokens and not batch:
            words[at + 1] = counters[1] = counters[1] + 1
        words[at + 2] = counters[2] = counters[2] + duration_ns
        words[at + 3] = counters[3] = counters[3] + prefill_tokens
        words[at + 4] = counters[4] = counters[4] + batch
        words[self._at_step_start] = 0
        model = self._model
        model.end(duration_ns, prefill_tokens, batch, self._held_at_start, held_tokens)
        at = self._at_model
        words[at], words[at + 1], words[at + 2] = model.words[:3]
        self.unreported = True  # what the model has learnt is stored then

    def forget(self) -> None:
        """Call it instead of the exit if the step computed nothing: it is not counted."""
        words, at = self._words, self._at_model
        words[self._at_step_start] = words[at] = words[at + 1] = words[at + 2] = 0

    def finished(self, requests: int) -> None:
        """Counts requests that ended, for the step model."""
        self._model.finished(requests)

    def report(self, waiting: int, running: int, prefill_backlog: int) -> None:
        """Tells the step model what the last step left: the load that the engine publishes first after it.

        Stores what the model has learnt by then.
        """
        self.unreported = False
        words, at, model = self._words, self._at_model, self._model.words
        self._model.after_step(waiting, running, prefill_backlog)
        words[at + 2] = model[HELD_TOKENS]
        if (learnt := model[3:]) != self._learnt:  # most steps teach nothing new
            self._learnt = learnt
            for i, value in enumerate(learnt, at + 3):
                words[i] = value
