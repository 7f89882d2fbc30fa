"""One rank of the laboratory: the batching of the demo, a prefix cache, and the row that it publishes.

It works like the process of `dpshm.sim.demo.engine`. Before each step it receives the requests that have come. It
publishes when a step begins and when the last one ends. Requests that come later are in flight. Its row holds the
words of an engine's row on the board, including learnt step times (`dpshm.policies.step_model`). What of a prompt
is cached is looked up twice, as in vLLM: when the request is taken in, for the backlog that the row shows, and
when it is admitted, for what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log1p, sqrt
from random import Random
from typing import Literal, NamedTuple, TypeAlias

from dpshm.board.words import pack_load
from dpshm.policies.step_model import (
    BASE_NS,
    CHUNK_TOKENS,
    HELD_TOKENS,
    PER_HELD_TOKEN_PS,
    STEP_END,
    STEP_TOKENS,
    StepModel,
)
from dpshm.sim.batching import Batcher, SimRequest, Step
from dpshm.sim.lab.prefix_cache import PrefixCache
from dpshm.sim.step_cost import StepCost

Coefficients: TypeAlias = Literal["learnt", "true", "none"]


class Job:
    """One request in the laboratory. Times are in seconds, -1 until they are known."""

    __slots__ = (
        *("blocks", "booked_tokens", "done_s", "due_s", "first_s", "frontend", "hit_tokens"),
        *("key", "output_tokens", "prompt_tokens", "rank"),
    )

    def __init__(  # noqa: PLR0917 - as a row of a table
        self,
        due_s: float,
        frontend: int,
        prompt_tokens: int,
        output_tokens: int,
        key: int | None = None,
        blocks: tuple[int, ...] = (),
    ) -> None:
        self.due_s = due_s
        self.frontend = frontend
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.key = key
        self.blocks = blocks
        self.rank = -1
        self.booked_tokens = prompt_tokens  # of its prompt, what its front-end expects to be computed
        self.hit_tokens = 0
        self.first_s = -1.0
        self.done_s = -1.0


class Pace:
    """How many times as long as its cost says each step of a rank takes.

    Args:
        noise: the coefficient of variation of steps, drawn from a log-normal distribution of mean 1.
        spells: from when until when the rank is so many times as slow: (at, until, factor).
        seed: of the noise; the same seed gives the same noise.
    """

    def __init__(self, noise: float, spells: Sequence[tuple[float, float, float]], seed: int) -> None:
        self._deviation = sqrt(log1p(noise * noise))
        self._spells = spells
        self._random = Random(seed)

    def factor(self, now_s: float) -> float:
        """Of the step that begins now."""
        factor = 1.0
        if self._deviation:
            factor = self._random.lognormvariate(-self._deviation * self._deviation / 2, self._deviation)
        for at_s, until_s, slower in self._spells:
            if at_s <= now_s < until_s:
                factor *= slower
        return factor


class Row(NamedTuple):
    """The row that a rank has published.

    Attributes:
        load: the packed load word.
        backlog: prompt tokens received and not computed.
        model: the words of `dpshm.board.layout.STEP_MODEL_WORDS`.
        received: requests received, by front-end.
        received_tokens: prompt tokens received, as booked, by front-end.
        in_all: requests and prompt tokens received of all front-ends.
        steps: the number of steps that have ended.
    """

    load: int
    backlog: int
    model: tuple[int, ...]
    received: tuple[int, ...]
    received_tokens: tuple[int, ...]
    in_all: tuple[int, int]
    steps: int


class SimRank:
    """One rank.

    Attributes:
        row: the row that it published last.
        inbox: requests sent to it and not received.
        inbox_tokens: prompt tokens of these requests, as booked.
        busy_until_s: time when its step ends; -1 between steps.
    """

    def __init__(
        self,
        cost: StepCost,
        num_frontends: int,
        coefficients: Coefficients = "learnt",
        block_tokens: int = 512,
        pace: Pace | None = None,
    ) -> None:
        self.cache = PrefixCache(block_tokens)
        self.batcher = Batcher(cost, self)
        self.inbox: list[Job] = []
        self.inbox_tokens = 0
        self.busy_until_s = -1.0
        self.step = Step(0, 0, 0, 0.0)
        self._cost = cost
        self._pace = pace
        self._model = StepModel()
        self._learns = coefficients == "learnt"
        self._steps = 0
        self._received = [0] * num_frontends
        self._received_tokens = [0] * num_frontends
        self.row: Row
        if coefficients == "true":
            words = self._model.words
            words[BASE_NS : CHUNK_TOKENS + 1] = (
                *(int(x * 1e9) for x in (cost.base_s, cost.per_request_s, cost.per_prompt_token_s)),
                cost.max_step_tokens,
            )
            words[PER_HELD_TOKEN_PS] = int(cost.per_held_token_s * 1e12)
        self._frozen = ((0,) * num_frontends, (0,) * num_frontends, (0, 0))
        self.publish()

    def send(self, job: Job) -> None:
        """Adds a request that a front-end sent."""
        self.inbox.append(job)
        self.inbox_tokens += job.booked_tokens

    def begin(self, now_s: float) -> Step:
        """Receives the requests that have come, and plans the next step."""
        self.cache.now_s = now_s
        if self.inbox:
            self._take_in()
        batcher = self.batcher
        step = batcher.plan()
        if self._pace is not None:
            step = step._replace(seconds=step.seconds * self._pace.factor(now_s))
        self.step = step
        if not self._learns:
            words = self._model.words
            words[STEP_END] = int((now_s + step.seconds) * 1e9) if words[BASE_NS] else 0
            words[STEP_TOKENS], words[HELD_TOKENS] = step.prompt_tokens, step.held_tokens
        else:
            self._model.begin(int(now_s * 1e9), step.prompt_tokens, step.batch, step.held_tokens)
        self.publish()
        return step

    def end(self, now_s: float, seconds: float) -> list[Job]:
        """Ends the step, which took that long; returns the requests that are complete."""
        batcher = self.batcher
        self._steps += 1
        finished = batcher.finish(self.step)
        for request in finished.first_tokens:
            job = request.key
            job.first_s = now_s
        completed = []
        for request in finished.completed:
            request.key.done_s = now_s
            completed.append(request.key)
        if not self._learns:
            words = self._model.words
            words[STEP_END] = words[STEP_TOKENS] = 0
            words[HELD_TOKENS] = batcher.held_tokens
        else:
            self._model.finished(len(completed))
            self._model.end(
                int(seconds * 1e9),
                self.step.prompt_tokens,
                self.step.batch,
                self.step.held_tokens,
                batcher.held_tokens,
            )
            self._model.after_step(batcher.waiting, batcher.running, batcher.prefill_backlog)
        return completed

    @property
    def unfinished(self) -> int:
        """Requests that the rank has, and requests in flight to it."""
        return self.batcher.unfinished + len(self.inbox)

    def cached(self, request: SimRequest) -> int:
        """See `dpshm.sim.batching.PrefixSource`."""
        job = request.key
        if not job.blocks:
            return 0
        hit: int = self.cache.hit_tokens(job.blocks, job.prompt_tokens)
        if not request.started and not request.generated:
            job.hit_tokens = hit
        return hit

    def computed(self, request: SimRequest, tokens: int) -> None:
        """See `dpshm.sim.batching.PrefixSource`."""
        if blocks := request.key.blocks:
            whole = tokens >= request.prompt_tokens
            done = blocks if whole else blocks[: tokens // self.cache.block_tokens]
            self.cache.insert(done, self._cost.kv_tokens - self.batcher.kv_used)

    def _take_in(self) -> None:
        for job in self.inbox:
            self._received[job.frontend] += 1
            self._received_tokens[job.frontend] += job.booked_tokens
            expected = self.cache.hit_tokens(job.blocks, job.prompt_tokens) if job.blocks else 0
            self.batcher.add(SimRequest(job, job.prompt_tokens, job.output_tokens, expected))
        self.inbox.clear()
        self.inbox_tokens = 0
        in_all = sum(self._received), sum(self._received_tokens)
        self._frozen = (tuple(self._received), tuple(self._received_tokens), in_all)

    def publish(self) -> None:
        """Publishes the current row. `begin` does so too; after `end` call one of the two."""
        batcher = self.batcher
        load = pack_load(batcher.waiting, batcher.running, batcher.kv_cache_usage)
        self.row = Row(load, batcher.prefill_backlog, tuple(self._model.words), *self._frozen, self._steps)
