"""Continuous batching on one rank, as a pure model: no clock, no socket, no randomness.

`Batcher` schedules as vLLM does: first come, first served. Every step advances all decoding requests by one token
and spends the rest of its budget of tokens on prompts, in chunks. A caller runs ``step = batcher.plan()``, waits
``step.seconds``, and runs ``finished = batcher.finish(step)``. The same calls give the same answers. The cost of a
call grows with the requests that change, not with all that run.

Invariants:

- a request that was added is waiting or running until it completes: none is ever lost or doubled;
- at most ``max_running`` requests run, and ``kv_used`` never exceeds ``kv_tokens``;
- a request is admitted when the uncached part of its prompt fits the free KV cache, and takes that room at once;
  each decoded token takes one more. The cached part is looked up when the request is admitted, not when it comes
  (`PrefixSource`), so a waiting request finds the blocks that earlier steps computed, as in vLLM;
- when the cache is full, the request that was admitted last is preempted: it gives all its room back, goes to the
  head of the queue, and computes its prompt and its generated tokens again. The oldest request is never preempted
  for a younger one, so the queue always moves.

`dpshm.sim.step_cost` says how long a step takes.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple, Protocol

from dpshm.errors import SettingError
from dpshm.sim.step_cost import StepCost


class Step(NamedTuple):
    """The content of one step, and its duration.

    Attributes:
        prompt_tokens: prompt tokens that the step computes, over all requests.
        batch: requests in the step.
        output_tokens: requests that get a token from the step; a prompt's last chunk yields one.
        seconds: duration of the step on this rank alone.
        held_tokens: tokens of context of the running requests, which the step's attention reads.
    """

    prompt_tokens: int
    batch: int
    output_tokens: int
    seconds: float
    held_tokens: int = 0


class Work(NamedTuple):
    """The work of a step, by request.

    Attributes:
        decoding: the requests that decode one token.
        chunks: the requests whose prompts the step computes, each with the number of its next prompt tokens.
    """

    decoding: list[SimRequest]
    chunks: list[tuple[SimRequest, int]]


class PrefixSource(Protocol):
    """The prefix cache that a `Batcher` asks."""

    def cached(self, request: SimRequest) -> int:
        """How many leading tokens of its prompt are cached now: less than all."""

    def computed(self, request: SimRequest, tokens: int) -> None:
        """The next step ends with so many leading tokens of its prompt computed; later requests find them."""


class SimRequest:
    """One request on a rank. The caller keeps `key` for itself, to know the request again.

    Attributes:
        cached: leading tokens of the prompt that are not computed; until it is admitted, those expected.
    """

    __slots__ = (
        *("base_step", "cached", "generated", "key", "output_tokens", "prompt_left", "prompt_tokens", "started"),
    )

    def __init__(self, key: Any, prompt_tokens: int, output_tokens: int, cached: int = 0) -> None:
        self.key = key
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.cached = cached
        self.generated = 0  # up to when it was last admitted, or its prefill last ended
        self.prompt_left = prompt_tokens - cached  # to compute before it decodes
        self.base_step = -1  # the step that ended its prefill; -1 while it does not decode
        self.started = False  # its first token is out

    def copy(self) -> SimRequest:
        """A copy with the same key."""
        other = SimRequest(self.key, self.prompt_tokens, self.output_tokens, self.cached)
        other.generated, other.prompt_left = self.generated, self.prompt_left
        other.base_step, other.started = self.base_step, self.started
        return other


class Finished(NamedTuple):
    """The results of a step."""

    first_tokens: list[SimRequest]
    completed: list[SimRequest]


class Batcher:
    """The scheduler of one rank.

    Attributes:
        cost: limits and step times.
        prefixes: the prefix cache; None: there is none, and requests compute what they say.
        kv_used: tokens of KV cache in use. A cached part of a prompt is not counted.
        held_tokens: tokens of the running requests that are computed or cached: what attention reads.
        prefill_backlog: prompt tokens of all its requests that are not computed yet.
        preemptions: number of times that a request lost its room.
    """

    def __init__(self, cost: StepCost | None = None, prefixes: PrefixSource | None = None) -> None:
        self.cost = cost or StepCost()
        self.prefixes = prefixes
        self.kv_used = 0
        self.held_tokens = 0
        self.prefill_backlog = 0
        self.preemptions = 0
        self._steps = 0
        self._waiting: deque[SimRequest] = deque()
        # In the order of admission. Prompts are computed in that order too, so those that still compute
        # theirs are the youngest; `dict` because a request leaves from anywhere.
        self._prefilling: dict[SimRequest, None] = {}
        self._decoding: dict[SimRequest, None] = {}
        self._ends: dict[int, list[SimRequest]] = {}  # by the step that yields their last token

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def unfinished(self) -> int:
        """Requests that are waiting or running."""
        return self.waiting + self.running

    @property
    def kv_cache_usage(self) -> float:
        """The share of the KV cache in use."""
        return self.kv_used / self.cost.kv_tokens

    def fits(self, prompt_tokens: int, output_tokens: int) -> bool:
        """Whether such a request can ever run here. A server refuses a request that cannot."""
        limit = self.cost.kv_tokens if self.cost.max_context is None else self.cost.max_context
        return prompt_tokens + output_tokens <= min(limit, self.cost.kv_tokens)

    def add(self, request: SimRequest) -> None:
        """Puts a request at the end of the queue.

        Raises:
            SettingError: the request has no tokens, or can never fit.
        """
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise SettingError(
                f"a request needs at least one prompt and one output token, this one has "
                f"{request.prompt_tokens} and {request.output_tokens}"
            )
        if not self.fits(request.prompt_tokens, request.output_tokens):
            raise SettingError(
                f"a request of {request.prompt_tokens} + {request.output_tokens} tokens can never fit a KV "
                f"cache of {self.cost.kv_tokens} (max_context {self.cost.max_context}): refuse it, or raise them"
            )
        self._waiting.append(request)
        self.prefill_backlog += request.prompt_left

    def copy(self, prefixes: PrefixSource | None = None) -> Batcher:
        """A copy that can be driven on by itself, with that prefix cache; its requests have the same keys."""
        other = Batcher(self.cost, prefixes)
        other.kv_used, other.prefill_backlog = self.kv_used, self.prefill_backlog
        other.held_tokens = self.held_tokens
        other.preemptions, other._steps = self.preemptions, self._steps
        copies = {r: r.copy() for r in (*self._waiting, *self._prefilling, *self._decoding)}
        other._waiting = deque(copies[r] for r in self._waiting)
        other._prefilling = {copies[r]: None for r in self._prefilling}
        other._decoding = {copies[r]: None for r in self._decoding}
        other._ends = {step: [copies[r] for r in requests] for step, requests in self._ends.items()}
        return other

    def plan(self) -> Step:
        """Makes room, admits the requests that fit, and plans the next step."""
        batch = output_tokens = self._make_room()
        room = budget = max(0, self.cost.max_step_tokens - batch)
        begun = iter(tuple(self._prefilling))
        while budget and (request := next(begun, None) or self._admit()):
            computed = min(budget, request.prompt_left)
            budget -= computed
            batch += 1
            output_tokens += computed == request.prompt_left
            if self.prefixes is not None:
                left = request.prompt_left - computed
                self.prefixes.computed(request, request.prompt_tokens + request.generated - left)
        prompt_tokens = room - budget
        held_tokens = self.held_tokens
        seconds = self.cost.seconds(prompt_tokens, batch, held_tokens)
        return Step(prompt_tokens, batch, output_tokens, seconds, held_tokens)

    def work(self, step: Step) -> Work:
        """The work by request of the step that `plan` returned, for an accelerator that computes it."""
        chunks = []
        budget = step.prompt_tokens
        for request in self._prefilling:  # in the order in which `finish` takes them
            if not budget:
                break
            computed = min(budget, request.prompt_left)
            budget -= computed
            chunks.append((request, computed))
        return Work(list(self._decoding), chunks)

    def is_running(self, request: SimRequest) -> bool:
        """Whether a request has room in the KV cache."""
        return request in self._prefilling or request in self._decoding

    def finish(self, step: Step) -> Finished:
        """Records that the step that `plan` returned is done."""
        self._steps += 1
        # Decoding requests come first: a prefill that ends in this step yields its own token.
        self.kv_used += len(self._decoding)
        self.held_tokens += len(self._decoding)
        completed = self._ends.pop(self._steps, [])
        for request in completed:
            del self._decoding[request]
            self.kv_used -= self._held(request)
            self.held_tokens -= self._computed(request)
        first_tokens = []
        budget = step.prompt_tokens
        while budget:
            request = next(iter(self._prefilling))
            computed = min(budget, request.prompt_left)
            budget -= computed
            request.prompt_left -= computed
            self.prefill_backlog -= computed
            self.held_tokens += computed
            if request.prompt_left:
                continue
            del self._prefilling[request]
            if not request.started:
                request.started = True
                first_tokens.append(request)
            self._begin_decoding(request, completed)
        return Finished(first_tokens, completed)

    def _begin_decoding(self, request: SimRequest, completed: list[SimRequest]) -> None:
        request.generated += 1
        request.base_step = self._steps
        left = request.output_tokens - request.generated
        if left:
            self._decoding[request] = None
            self._ends.setdefault(self._steps + left, []).append(request)
        else:
            self.kv_used -= self._held(request)
            self.held_tokens -= self._computed(request)
            completed.append(request)

    def _held(self, request: SimRequest) -> int:
        """The KV cache tokens that a running request uses. The newest token is written in the next step."""
        if request.base_step < 0:
            return request.prompt_tokens - request.cached + request.generated
        return request.prompt_tokens - request.cached + request.generated - 1 + self._steps - request.base_step

    def _computed(self, request: SimRequest) -> int:
        """The tokens of a running request that are computed or were found in the cache."""
        if request.base_step < 0:
            return request.prompt_tokens + request.generated - request.prompt_left
        return request.cached + self._held(request)

    def _make_room(self) -> int:
        """Preempts until each decoding request has room for one more token; returns how many decode."""
        while self.kv_used + len(self._decoding) > self.cost.kv_tokens:
            # A request's own limit is checked in `add`, so this never reaches the last one.
            youngest = next(reversed(self._prefilling or self._decoding))
            self._preempt(youngest)
        return len(self._decoding)

    def _preempt(self, request: SimRequest) -> None:
        self.preemptions += 1
        self.kv_used -= self._held(request)
        self.held_tokens -= self._computed(request)
        if request.base_step < 0:
            del self._prefilling[request]
            self.prefill_backlog -= request.prompt_left
        else:
            del self._decoding[request]
            ends = request.base_step + request.output_tokens - request.generated
            self._ends[ends].remove(request)
            request.generated += self._steps - request.base_step
            request.base_step = -1
        request.cached = 0
        request.prompt_left = request.prompt_tokens + request.generated
        self.prefill_backlog += request.prompt_left
        self._waiting.appendleft(request)

    def _admit(self) -> SimRequest | None:
        if not self._waiting or self.running >= self.cost.max_running:
            return None
        request = self._waiting[0]
        if self.prefixes is not None:
            found = self.prefixes.cached(request)
            gained = found - request.cached
            request.cached = found
            request.prompt_left -= gained
            self.prefill_backlog -= gained
        # Room for the requests that decode in this step stays free, or the new request would be preempted next.
        if self.kv_used + len(self._decoding) + request.prompt_left > self.cost.kv_tokens:
            return None
        self._waiting.popleft()
        self._prefilling[request] = None
        self.kv_used += request.prompt_left
        self.held_tokens += self._computed(request)
        return request
