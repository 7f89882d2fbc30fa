"""What an engine learns of its own steps: how long one takes, for how much it holds.

    duration = base + per_request * batch + per_token * prefill_tokens + per_held_token * held_tokens

Held tokens are the context of the running requests, which attention reads. The four coefficients are found by
least squares over the steps themselves, each weighted by ``FORGETTING`` to the power of its age, so they follow
an engine that slows down. Steps often say nothing about one of the four (a constant batch, no prompts for a
while): so the estimate is also drawn, with the weight of one step, to where it was in the last steps. Before
the first it is 0: a request is free until steps show what it costs. A negative one counts as 0; if it is that
of the batch or of held tokens, the others are found anew. A direction of which nothing new is known keeps its
last value instead of drifting, the well-known fault of recursive least squares with forgetting (Astrom,
Wittenmark, "Adaptive Control", 2nd ed., ch. 11.5). An engine's first steps are solved one by one. Were the
estimate drawn to its last value, the same few steps would move it at each solution: from small batches and one
long step among them an engine would learn that a batch of 16 takes twice as long as it does.

An engine that becomes slow, or recovers, is followed within some tens of steps: when its newest steps took less
than `PACE_FAST` or more than `PACE_SLOW` times their expectation on average, the weights of older steps fall by
`FORGETTING_FAST` a step until the average is near 1 again. Noise does not reach these bounds: where equal steps
vary by half, the average varies by a tenth.

Three more things are learnt for who has to wait. `chunk_tokens`: the most prompt tokens that a step computed, once
a step has left some, so that a long backlog can be counted in steps. `max_running`: how many requests ran when
some steps in a row left others waiting although they had tokens to spare: the batch or the KV cache was full. It
is forgotten when more run and none waits, and after `LIMIT_STEPS` without a queue: a KV cache that was full of a
few long contexts has room for many short ones. `ending_ns`: the mean time from one request's end to the next: how
fast the queue moves once an engine is full.

Pure: no clock, no memory map. `Engine` stores the words (`dpshm.board.layout.STEP_MODEL_WORDS`) on the board; the
simulator hands the same words to the same policies.
"""

from __future__ import annotations

from collections.abc import Sequence

from dpshm.board.layout import STEP_MODEL_WORDS

# The words by name.
STEP_END, STEP_TOKENS, HELD_TOKENS = map(STEP_MODEL_WORDS.index, ("step_end", "step_tokens", "held_tokens"))
BASE_NS, PER_REQUEST_NS, PER_TOKEN_NS, CHUNK_TOKENS, MAX_RUNNING, ENDING_NS, PER_HELD_TOKEN_PS = map(
    STEP_MODEL_WORDS.index,
    (
        *("base_ns", "per_request_ns", "per_token_ns"),
        *("chunk_tokens", "max_running", "ending_ns", "per_held_token_ps"),
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
BEFORE_KEPT = 0.875
"""A step, in where the estimate was in the last steps: eight of them count, as many as are solved together."""
MIN_STEPS = 16
"""Steps before an engine's coefficients are published,"""
MIN_PROMPT_STEPS = 4
"""so many of which have to have computed prompts."""
SOLVE_EVERY = 8
"""Steps between two solutions, once `SOLVED_EACH` are done; before, after each."""
SOLVED_EACH = 64
OUTLIER_FACTOR = 4.0
"""A step that takes more than so many times its expectation (a page fault, a stopped process) counts as so
many times: a stray one does little, and an engine that has become slow is still followed."""
BLOCKED_STEPS = 3
"""Steps in a row that leave requests waiting, before the engine counts as full."""
LIMIT_STEPS = 500
"""Steps that leave none waiting, before the engine no longer counts as full at what ran then."""
_BATCH_UNIT, _TOKEN_UNIT, _HELD_UNIT = 16.0, 1024.0, 65536.0  # of the order of base: one ridge suits all four


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
        # ns: base, per _BATCH_UNIT requests, per _TOKEN_UNIT prompt tokens, per _HELD_UNIT held tokens
        self._theta = (0.0, 0.0, 0.0, 0.0)
        self._before = (0.0, 0.0, 0.0)  # all but base, as they were in the last steps
        # Weighted sums: of 1, batch, tokens, held tokens and their products, then of the duration with each.
        self._sums = (0.0,) * 14
        self._seen: list[tuple[int, int, int, int, int]] = []  # steps of which nothing is learnt yet
        self._finished = 0  # since the last step ended
        self._finished_told = 0  # of those, the ones that `after_step` has seen
        self._finished_in_step = 0
        self._busy_ns = self._ended = 0.0  # weighted: time, and requests that ended in it
        self.step_tokens: int | None = None
        self._most_tokens = 0  # prompt tokens of the step that computed most
        self._blocked = self._blocked_running = 0  # steps in a row, and the most requests that ran in them
        self._without_queue = 0  # steps that left none waiting, since the engine was full

    def begin(self, now_ns: int, prefill_tokens: int, batch: int, held_tokens: int = 0) -> None:
        """A step begins; afterwards `words` say when it should end and what it computes, as far as is known.

        Args:
            now_ns: CLOCK_MONOTONIC.
            prefill_tokens: prompt tokens that it computes.
            batch: requests in it.
            held_tokens: tokens of context of the running requests.
        """
        words = self.words
        words[STEP_TOKENS], words[HELD_TOKENS] = prefill_tokens, held_tokens
        words[STEP_END] = now_ns + int(self.expect(prefill_tokens, batch, held_tokens)) if words[BASE_NS] else 0

    def finished(self, requests: int) -> None:
        """Requests ended; counted with the step that `end` ends next."""
        self._finished += requests

    def end(
        self,
        duration_ns: int,
        prefill_tokens: int,
        batch: int,
        held_tokens: int = 0,
        held_after: int | None = None,
    ) -> None:
        """The step is over; afterwards `words` hold what was learnt of it, and the context that is held after
        it.
        """
        words = self.words
        self._steps += 1
        self._prompt_steps += prefill_tokens > 0
        # Learnt together: caches are cold after a step, and code that runs once in eight steps warms them once.
        self._seen.append((duration_ns, prefill_tokens, batch, held_tokens, self._finished))
        # Engines count those that a step finished before it ends or after: of both kinds, once.
        self._finished_in_step = self._finished - self._finished_told
        self._finished = self._finished_told = 0
        self.step_tokens = prefill_tokens
        words[STEP_END] = words[STEP_TOKENS] = 0
        words[HELD_TOKENS] = held_tokens if held_after is None else held_after
        if self._steps % SOLVE_EVERY == 0 or self._steps < SOLVED_EACH:
            for step in self._seen:
                self._take(*step)
            kept = BEFORE_KEPT ** len(self._seen)
            self._seen.clear()
            self._solve(kept)
            words[ENDING_NS] = int(self._busy_ns / self._ended) if self._ended >= 1.0 else 0
            if self._steps >= MIN_STEPS and self._prompt_steps >= MIN_PROMPT_STEPS:
                base, per_batch, tokens, held = self._theta
                # Base is never published as 0, which means "not learnt".
                words[BASE_NS] = int(base) or 1
                words[PER_REQUEST_NS] = int(per_batch / _BATCH_UNIT)
                words[PER_TOKEN_NS] = int(tokens / _TOKEN_UNIT)
                words[PER_HELD_TOKEN_PS] = int(held * 1000.0 / _HELD_UNIT)

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
        if not running:
            words[HELD_TOKENS] = 0
        self._finished_told = self._finished
        running += self._finished_in_step + self._finished
        # A step shows what it can do also where it leaves nothing. Of short prompts that a full batch kept waiting
        # the first step that leaves some may be a small one.
        self._most_tokens = max(self._most_tokens, tokens)
        if words[CHUNK_TOKENS] or (tokens and prefill_backlog):
            words[CHUNK_TOKENS] = max(words[CHUNK_TOKENS], self._most_tokens)
        # A request that came in while the step ran waits too, but not for long: not for three steps in a row.
        # In vLLM decoding requests take tokens of the same budget: a full step then computes fewer of prompts.
        if waiting and (tokens + running < words[CHUNK_TOKENS] or not tokens):
            self._blocked += 1
            self._blocked_running = max(self._blocked_running, running)
            if self._blocked >= BLOCKED_STEPS:
                words[MAX_RUNNING] = self._blocked_running
                self._without_queue = 0
            return
        self._blocked = self._blocked_running = 0
        if words[MAX_RUNNING] and not waiting:
            self._without_queue += 1
            if running > words[MAX_RUNNING] or self._without_queue >= LIMIT_STEPS:
                words[MAX_RUNNING] = 0

    def expect(self, prefill_tokens: int, batch: int, held_tokens: int = 0) -> float:
        """How long such a step should take, in ns."""
        base, per_batch, per_tokens, per_held = self._theta
        return (
            base
            + per_batch * (batch / _BATCH_UNIT)
            + per_tokens * (prefill_tokens / _TOKEN_UNIT)
            + per_held * (held_tokens / _HELD_UNIT)
        )

    def _take(self, duration_ns: int, prefill_tokens: int, batch: int, held_tokens: int, finished: int) -> None:
        f, y = FORGETTING, float(duration_ns)
        self._busy_ns = self._busy_ns * f + y
        self._ended = self._ended * f + finished
        if self._steps > MIN_STEPS:
            expected = self.expect(prefill_tokens, batch, held_tokens)
            y = min(y, OUTLIER_FACTOR * expected)
            self._pace += PACE_WEIGHT * (min(y / expected, PACE_MOST) - self._pace) if expected else 0.0
            if self._follows:
                self._follows = abs(self._pace - 1.0) > PACE_NEAR
            else:
                self._follows = not PACE_FAST < self._pace < PACE_SLOW
            if self._follows:
                f = FORGETTING_FAST
        b, t, h = batch / _BATCH_UNIT, prefill_tokens / _TOKEN_UNIT, held_tokens / _HELD_UNIT
        n, sb, st, sh, sbb, sbt, sbh, stt, sth, shh, sy, sby, sty, shy = self._sums
        self._sums = (
            *(n * f + 1.0, sb * f + b, st * f + t, sh * f + h),
            *(sbb * f + b * b, sbt * f + b * t, sbh * f + b * h),
            *(stt * f + t * t, sth * f + t * h, shh * f + h * h),
            *(sy * f + y, sby * f + b * y, sty * f + t * y, shy * f + h * y),
        )

    def _solve(self, kept: float) -> None:
        """Least squares with a ridge; never negative.

        Args:
            kept: the weight of the last solution, in where the estimate was in the last steps.
        """
        n, sb, st, sh, sbb, sbt, sbh, stt, sth, shh, sy, sby, sty, shy = self._sums
        base, (batch, tokens, held) = self._theta[0], self._before
        matrix = (
            (n + 1.0, sb, st, sh),
            (sb, sbb + 1.0, sbt, sbh),
            (st, sbt, stt + 1.0, sth),
            (sh, sbh, sth, shh + 1.0),
        )
        right = (sy + base, sby + batch, sty + tokens, shy + held)
        used = [0, 1, 2, 3]
        found = solve(matrix, right, used)
        # Batch and held tokens grow together: what one has too little the other has too much.
        if found[3] < 0.0 or (found[1] < 0.0 < found[3]):
            used = [0, 1, 2] if found[3] < 0.0 else [0, 2, 3]
            found = solve(matrix, right, used)
        theta = [0.0] * 4
        for i, value in zip(used, found, strict=True):
            theta[i] = max(0.0, value)
        self._theta = (theta[0], theta[1], theta[2], theta[3])
        self._before = (
            batch + (1.0 - kept) * (theta[1] - batch),
            tokens + (1.0 - kept) * (theta[2] - tokens),
            held + (1.0 - kept) * (theta[3] - held),
        )


def solve(matrix: Sequence[Sequence[float]], right: Sequence[float], used: Sequence[int]) -> list[float]:
    """Solves the system of the used rows and columns, by elimination without exchanges.

    Args:
        matrix: symmetric and positive definite, so no pivot is 0.
        right: the right-hand side.
        used: indices of rows and columns.
    """
    rows = [[*(matrix[i][j] for j in used), right[i]] for i in used]
    size = len(rows)
    for k, pivot in enumerate(rows):
        for row in rows[k + 1 :]:
            factor = row[k] / pivot[k]
            for j in range(k + 1, size + 1):
                row[j] -= factor * pivot[j]
    found = [0.0] * size
    for k in range(size - 1, -1, -1):
        row = rows[k]
        found[k] = (row[size] - sum(row[j] * found[j] for j in range(k + 1, size))) / row[k]
    return found
