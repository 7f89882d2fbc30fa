"""`LeastWork`: the engine that will have computed this prompt first, in nanoseconds.

What a new request waits for, at an engine that serves first come, first served with chunked prefill:

    wait = rest of the step that runs now (at most `REST_STEPS` times what such a step takes)
         + the longer of
             steps * decode step + per_token * tokens
             ending * (requests + 1 - max_running)

    decode load = per_request * requests + per_held_token * (held tokens + tokens sent and not computed)
    decode step = base + per_request + decode load
    tokens = sent and not computed - those of the running step + its own that are not cached
    steps = ceil(tokens / chunk)

The first is the work in front of it. The second is the wait for room, if that many requests have to end first.

Ranks are compared by more than this wait (`scores_of_few`). Independent ranks:

    wait + `DECODE_STEPS` * decode load + per_token * own tokens that are not cached * requests / 8

The second term is what the request will feel while it decodes: a rank with long contexts is slow for all its life.
The third is the delay that its prompt brings to the requests that run there. Without the two, long prompts meet on
ranks with many running requests or long contexts, whose tokens then come late.

Ranks in lockstep wait for each other in every step (`dpshm.policies.lockstep`).

Of ranks with equal times the one that has more of the prompt cached is taken: a cached token counts as one
nanosecond, a ten-thousandth of what it takes to compute one.

All of it stands on the board. The counts are reported plus in flight. ``base``, ``per_request``, ``per_token``,
``per_held_token``, ``chunk``, ``max_running`` and ``ending`` are what each engine has learnt of its own steps
(`dpshm.policies.step_model`), so an engine that is slow, or of another kind, or slows down, is seen as what it
is, and nothing has to be tuned. An engine that has learnt nothing yet, because it has just started or is a stock
one, is taken to be like the mean of those that have. If none has, or the view has no tokens, requests are
counted, as `least_loaded` does.

Source: the idea that a request should go where the *work* in front of it, not the number of requests, is least
is old: Harchol-Balter, Crovella, Murta, "On choosing a task assignment policy for a distributed server system",
JPDC 59(2), 1999 (least work remaining). The estimate of that work is ours.
"""

from __future__ import annotations

from itertools import repeat
from typing import ClassVar

import msgspec
import numpy as np

from dpshm.policies.columns import NO_LIMIT, ArrayColumns, ListColumns, PreparedModels, Words
from dpshm.policies.counts import least_loaded
from dpshm.policies.lockstep import lockstep_of_few, lockstep_of_many
from dpshm.policies.view import Request, View

REST_STEPS = 4
"""The rest of a running step counts as at most so many steps of its kind: neither a clock that jumps nor a damaged
word keeps a rank out of routing."""
_REST_STEPS_ARRAY = np.array(REST_STEPS)
DECODE_STEPS = 16
"""So many steps in which the request decodes count beside its wait. Outputs have more, but the wait for the first
token is felt as such. bench/ROUTING.md has 0 to 64."""
_DECODE_STEPS_ARRAY = np.array(DECODE_STEPS)
DELAY_SHIFT = 3
"""The delay of others counts as an eighth. Counted in full it would send long prompts to ranks with few requests
whatever waits there. An eighth decides between ranks at which this request would wait about equally long."""
_DELAY_SHIFT_ARRAY = np.array(DELAY_SHIFT)
OVERLOADED_FROM = 1.5
"""An overloaded rank is taken if each of the others scores more than so many times as much. A rank whose
next prompt is too long for what is left of its KV cache has a queue that grows, and is not overloaded. Where all
others are, it got every request: with caches of 400,000 tokens on the Mooncake trace at 3x (8 seeds) the mean time
to first token falls from 0.63 to 0.60 of vLLM's with this rule, in lockstep the p99 from 1.26 to 1.14."""
PS_SHIFT = 10
"""From picoseconds to nanoseconds, near enough."""
_PS_SHIFT_ARRAY = np.array(PS_SHIFT)
_LOOK_FROM = 256
_NEVER_NS = 1 << 63
_NO_DELAY = 1 << 10
"""Shifts a delay away, however large."""


class LeastWork(msgspec.Struct, frozen=True):
    """The least expected time to first token; the formula stands at the top of this module."""

    sees_work: ClassVar[bool] = True

    def __call__(self, view: View, request: Request) -> int:
        """See `dpshm.policies.Policy`."""
        columns = view.columns
        if isinstance(columns, ListColumns):
            if columns.work is None or not columns.work.models[0][0]:
                return least_loaded(view, request)
            return columns.least(scores_of_few(columns, request), OVERLOADED_FROM)
        if columns.work is None or not columns.work.models[0, 0]:
            return least_loaded(view, request)
        return columns.least(scores_of_many(columns, request), OVERLOADED_FROM)

    def expected_ns(self, view: View, request: Request) -> list[int]:
        """By rank, nanoseconds from now to this request's first token; if none has learnt, a count of requests."""
        columns = view.columns
        if isinstance(columns, ListColumns):
            return expected_of_few(columns, request)
        expected: list[int] = expected_of_many(columns, request).tolist()
        return expected


def scores_of_few(columns: ListColumns, request: Request) -> list[int]:
    """By rank, what `LeastWork` compares, of few ranks that have learnt."""
    if columns.work is not None and columns.work.lockstep:
        return lockstep_of_few(columns, request, expected_of_few(columns, request))
    return expected_of_few(columns, request, compared=True)


def scores_of_many(columns: ArrayColumns, request: Request) -> Words:
    """The same for arrays."""
    if columns.work is not None and columns.work.lockstep:
        return lockstep_of_many(columns, request, expected_of_many(columns, request))
    return expected_of_many(columns, request, compared=True)


def expected_of_few(columns: ListColumns, request: Request, *, compared: bool = False) -> list[int]:
    """`LeastWork.expected_ns` of few ranks; if independent ranks are `compared`, with what that adds."""
    work = columns.work
    # A view of vLLM's broadcast has no tokens, and at first no engine has learnt anything: see `comparable`.
    if work is None or not work.models[0][0]:
        return [n + 1 for n in columns.requests]
    # In lockstep the step that runs ends for all at once: at no time is any of it left.
    now, own = _NEVER_NS if work.lockstep else work.now_ns, request.prompt_tokens
    # Without a comparison neither the decode load nor the delay counts: no test of it for each rank.
    decode_steps, delay_shift = (DECODE_STEPS, DELAY_SHIFT) if compared else (0, _NO_DELAY)
    # At least one token of a prompt is computed, whatever is cached.
    prompts = repeat(max(1, own)) if request.cached is None else [max(1, own - n) for n in request.cached]
    scores = []
    # One item a rank in each; `strict` would cost a tenth of the decision.
    by_rank = zip(columns.requests, work.tokens, work.steps, work.models, prompts)  # noqa: B905
    for requests, waiting, (step_end, step_tokens, held), model, uncached in by_rank:
        base, per_request, per_token, chunk, max_running, ending, per_held = model
        tokens = uncached
        if waiting > step_tokens:
            tokens += waiting - step_tokens
        load = per_request * requests
        if per_held:
            load += per_held * (held + waiting) >> PS_SHIFT
        ns = base + per_request + load
        if 0 < chunk < tokens:
            ns *= -(-tokens // chunk)
        ns += per_token * (tokens + (uncached * requests >> delay_shift))
        if requests >= max_running and (wait := ending * (requests + 1 - max_running)) > ns:
            ns = wait
        if (rest := step_end - now) > 0:
            most = REST_STEPS * (base + per_request + per_token * step_tokens)
            ns += rest if rest < most else most
        scores.append(ns + decode_steps * load)
    if compared and request.cached is not None:
        return [ns - hit for ns, hit in zip(scores, request.cached, strict=False)]
    return scores


def expected_of_many(columns: ArrayColumns, request: Request, *, compared: bool = False) -> Words:
    """The same for arrays."""
    work = columns.work
    if work is None or not work.models[0, 0]:
        return columns.requests + 1
    models = work.prepared or prepare(work.models)
    requests, steps = columns.requests, work.steps
    # Each call of numpy costs more than its arithmetic, and one with a Python number twice as much.
    own = np.array(max(1, request.prompt_tokens))
    if request.cached is not None:
        own = np.maximum(own - np.array(request.cached), 1)
    step_tokens = steps[:, 1]
    tokens = np.maximum(work.tokens, step_tokens)
    tokens -= step_tokens
    tokens += own
    load: Words = models.per_request * requests
    if models.most_held:
        held = steps[:, 2] + work.tokens
        held *= models.per_held
        held >>= _PS_SHIFT_ARRAY
        load += held
    ns: Words = load + models.base_and_request
    # To divide many costs more than to look whether any has to be divided.
    if models.least_chunk < NO_LIMIT and (
        len(tokens) < _LOOK_FROM or np.maximum.reduce(tokens) > models.least_chunk
    ):
        ns *= (tokens + models.chunk_less_one) // models.chunk
    if compared:
        delay = own * requests
        delay >>= _DELAY_SHIFT_ARRAY
        tokens += delay
    tokens *= models.per_token
    ns += tokens
    if models.least_running < NO_LIMIT:
        wait = requests - models.running_less_one
        wait *= models.ending
        np.maximum(ns, wait, out=ns)
    if not work.lockstep:
        now = np.array(work.now_ns)
        rest = np.maximum(steps[:, 0], now)
        rest -= now
        most = models.per_token * step_tokens
        most += models.base_and_request
        most *= _REST_STEPS_ARRAY
        np.minimum(rest, most, out=rest)
        ns += rest
    if compared:
        load *= _DECODE_STEPS_ARRAY
        ns += load
        if request.cached is not None:
            ns -= np.array(request.cached, np.int64)
    return ns


def prepare(models: Words) -> PreparedModels:
    """Models of many ranks as decisions need them; from the array form of what `comparable` gives."""
    base, per_request, per_token, chunk, max_running, ending, per_held = np.ascontiguousarray(models.T)
    least = int(chunk.min()), int(max_running.min()), int(per_held.max())
    return PreparedModels(
        base + per_request, per_request, per_token, chunk, chunk - 1, max_running - 1, ending, per_held, *least
    )
