"""What an engine learns of its own steps: how long one takes, for how much it holds.

    duration = base + per_request * batch + per_token * prefill_tokens

The three coefficients are found by least squares over the steps themselves, each weighted by ``FORGETTING`` to
the power of its age, so they follow an engine that slows down. Steps often say nothing about one of the three
(a constant batch, no prompts for a while): so the estimate is also drawn, with the weight of one step, to where it
was before. A direction of which nothing new is known keeps its last value instead of drifting, the well-known
fault of recursive least squares with forgetting (Astrom, Wittenmark, "Adaptive Control", 2nd ed., ch. 11.5).

An engine that becomes slow, or recovers, is followed within some tens of steps: when its newest steps took less
than `PACE_FAST` or more than `PACE_SLOW` times their expectation on average, the weights of older steps fall by
`FORGETTING_FAST` a step until the average is near 1 again. Noise does not reach these bounds: where equal steps
vary by half, the average varies by a tenth.

Three more things are learnt for who has to wait. `chunk_tokens`: the most prompt tokens that a step computed
while more were left, so that a long backlog can be counted in steps. `max_running`: how many requests ran when
some steps in a row left others waiting although they had tokens to spare: the batch or the KV cache was full.
`ending_ns`: the mean time from one request's end to the next: how fast the queue moves once an engine is full.

Pure: no clock, no memory map. `Engine` stores the words (`dpshm.board.layout.STEP_MODEL_WORDS`) on the board; the
simulator hands the same words to the same policies.
"""

from __future__ import annotations

from dpshm.board.layout import STEP_MODEL_WORDS

# The words by name.
STEP_END, STEP_TOKENS, BASE_NS, PER_REQUEST_NS, PER_TOKEN_NS, CHUNK_TOKENS, MAX_RUNNING, ENDING_NS = map(
    STEP_MODEL_WORDS.index,
    (
        *("step_end", "step_tokens", "base_ns", "per_request_ns", "per_token_ns"),
        *("chunk_tokens", "max_running", "ending_ns"),
    ),
)
FORGETTING = 0.998
"""Half of the weight lies on the last 350 steps: some seconds of a busy engine."""
FORGETTING_FAST = 0.9
PACE_WEIGHT = 0.07
"""Of the newest step, in the average of time over expectation."""
PACE_FAST, PACE_SLOW, PACE_MOST = 0.65, 1.5, 2.0
"""Bounds of that average, and what one step counts at most."""
PACE_NEAR = 0.1
"""How near to 1 the average has to come again."""
MIN_STEPS = 16
"""Steps before an engine's coefficients are published,"""
MIN_PROMPT_STEPS = 4
"""so many of which have to have computed prompts."""
SOLVE_EVERY = 8
"""Steps between two solutions, once `SOLVE_EVERY` squared are done; before, after each."""
OUTLIER_FACTOR = 4.0
"""A step that takes more than so many times its expectation (a page fault, a stopped process) counts as so
many times: a stray one does little, and an engine that has become slow is still followed."""
BLOCKED_STEPS = 3
"""Steps in a row that leave requests waiting, before the engine counts as full."""
_BATCH_UNIT, _TOKEN_UNIT = 16.0, 1024.0  # of the same order as base, so that one ridge suits all three


class StepModel:
    """The model of one engine; `words` are what it publishes.

    Attributes:
        words: the values of `dpshm.board.layout.STEP_MODEL_WORDS`; the coefficients are 0 until they are learnt.
        step_tokens: prompt tokens of the step that ended last, until `after_step` is told what it left; then None.
    """

    def __init__(self) -> None:
        self.words = [0] * len(STEP_MODEL_WORDS)
        self._steps = self._prompt_steps = 0
        self._pace = 1.0  # the newest steps' time over expectation
        self._follows = False  # it has left its bounds, and is not near 1 again
        self._theta = (0.0, 0.0, 0.0)  # ns: base, per _BATCH_UNIT requests, per _TOKEN_UNIT prompt tokens
        # Weighted sums: of 1, batch, tokens, their products, and of the duration with each.
        self._sums = (0.0,) * 9
        self._finished = 0  # since the last step ended
        self._finished_told = 0  # of those, the ones that `after_step` has seen
        self._finished_in_step = 0
        self._busy_ns = self._ended = 0.0  # weighted: time, and requests that ended in it
        self.step_tokens: int | None = None
        self._blocked = self._blocked_running = 0  # steps in a row, and the most requests that ran in them

    def begin(self, now_ns: int, prefill_tokens: int, batch: int) -> None:
        """A step begins; afterwards `words` say when it should end and what it computes, as far as is known.

        Args:
            now_ns: CLOCK_MONOTONIC.
            prefill_tokens: prompt tokens that it computes.
            batch: requests in it.
        """
        words = self.words
        words[STEP_TOKENS] = prefill_tokens
        words[STEP_END] = now_ns + int(self.expect(prefill_tokens, batch)) if words[BASE_NS] else 0

    def finished(self, requests: int) -> None:
        """Requests ended; counted with the step that `end` ends next."""
        self._finished += requests

    def end(self, duration_ns: int, prefill_tokens: int, batch: int) -> None:
        """The step is over; afterwards `words` hold what was learnt of it."""
        words = self.words
        self._steps += 1
        self._prompt_steps += prefill_tokens > 0
        self._busy_ns = self._busy_ns * FORGETTING + duration_ns
        self._ended = self._ended * FORGETTING + self._finished
        # Engines count those that a step finished before it ends or after: of both kinds, once.
        self._finished_in_step = self._finished - self._finished_told
        self._finished = self._finished_told = 0
        self.step_tokens = prefill_tokens
        self._take(float(duration_ns), prefill_tokens, batch)
        words[STEP_END] = words[STEP_TOKENS] = 0
        words[ENDING_NS] = int(self._busy_ns / self._ended) if self._ended >= 1.0 else 0
        if self._steps % SOLVE_EVERY == 0 or self._steps < SOLVE_EVERY * SOLVE_EVERY:
            self._solve()
            if self._steps >= MIN_STEPS and self._prompt_steps >= MIN_PROMPT_STEPS:
                base, per_batch, tokens = self._theta
                # Base is never published as 0, which means "not learnt".
                words[BASE_NS] = int(base) or 1
                words[PER_REQUEST_NS] = int(per_batch / _BATCH_UNIT)
                words[PER_TOKEN_NS] = int(tokens / _TOKEN_UNIT)

    def after_step(self, waiting: int, running: int, prefill_backlog: int) -> None:
        """What the step left, as the engine published it next. Later calls say nothing.

        Args:
            waiting: requests in the queue.
            running: requests that are not waiting.
            prefill_backlog: prompt tokens that are not computed.
        """
        tokens, words = self.step_tokens, self.words
        if tokens is None:
            return
        self.step_tokens = None
        self._finished_told = self._finished
        running += self._finished_in_step + self._finished
        if tokens > words[CHUNK_TOKENS] and (words[CHUNK_TOKENS] or prefill_backlog):
            words[CHUNK_TOKENS] = tokens
        # A request that came in while the step ran waits too, but not for long: not for three steps in a row.
        if waiting and (tokens < words[CHUNK_TOKENS] or not tokens):
            self._blocked += 1
            self._blocked_running = max(self._blocked_running, running)
            if self._blocked >= BLOCKED_STEPS:
                words[MAX_RUNNING] = self._blocked_running
        else:
            self._blocked = self._blocked_running = 0

    def expect(self, prefill_tokens: int, batch: int) -> float:
        """How long such a step should take, in ns."""
        base, per_batch, per_tokens = self._theta
        return base + per_batch * (batch / _BATCH_UNIT) + per_tokens * (prefill_tokens / _TOKEN_UNIT)

    def _take(self, y: float, prefill_tokens: int, batch: int) -> None:
        f = FORGETTING
        if self._steps > MIN_STEPS:
            expected = self.expect(prefill_tokens, batch)
            y = min(y, OUTLIER_FACTOR * expected)
            self._pace += PACE_WEIGHT * (min(y / expected, PACE_MOST) - self._pace) if expected else 0.0
            if self._follows:
                self._follows = abs(self._pace - 1.0) > PACE_NEAR
            else:
                self._follows = not PACE_FAST < self._pace < PACE_SLOW
            if self._follows:
                f = FORGETTING_FAST
        b, t = batch / _BATCH_UNIT, prefill_tokens / _TOKEN_UNIT
        n, sb, st, sbb, sbt, stt, sy, sby, sty = self._sums
        self._sums = (
            *(n * f + 1.0, sb * f + b, st * f + t),
            *(sbb * f + b * b, sbt * f + b * t, stt * f + t * t),
            *(sy * f + y, sby * f + b * y, sty * f + t * y),
        )

    def _solve(self) -> None:
        """The three by three system of least squares with a ridge, by Cramer's rule; never negative."""
        n, sb, st, sbb, sbt, stt, sy, sby, sty = self._sums
        base, batch, tokens = self._theta
        n, sbb, stt = n + 1.0, sbb + 1.0, stt + 1.0
        sy, sby, sty = sy + base, sby + batch, sty + tokens
        c00, c01, c02 = sbb * stt - sbt * sbt, sbt * st - sb * stt, sb * sbt - sbb * st
        c11, c12, c22 = n * stt - st * st, sb * st - n * sbt, n * sbb - sb * sb
        determinant = n * c00 + sb * c01 + st * c02  # at least 1: the ridge adds one to each diagonal item
        self._theta = (
            max(0.0, (c00 * sy + c01 * sby + c02 * sty) / determinant),
            max(0.0, (c01 * sy + c11 * sby + c12 * sty) / determinant),
            max(0.0, (c02 * sy + c12 * sby + c22 * sty) / determinant),
        )
