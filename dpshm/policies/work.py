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

    wait + `DECODE_STEPS` * decode load + per_token * delaying tokens * requests / 8
    delaying tokens = its own that are not cached, at most `DELAY_TOKENS`

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

from dpshm.policies.columns import ArrayColumns, ArrayRows, ArrayWork, ListColumns, ListWork, is_overloaded
from dpshm.policies.counts import least_loaded
from dpshm.policies.lockstep import lockstep_of_few, lockstep_of_many
from dpshm.policies.prepared import (
    DECODE_STEPS,
    DELAY_SHIFT,
    DELAY_TOKENS,
    NO_LIMIT,
    PS_SHIFT,
    REST_STEPS,
    PreparedArrays,
    Words,
    prepare,
    prepare_arrays,
)
from dpshm.policies.usual import usual_of_few, usual_of_many
from dpshm.policies.view import Request, View

OVERLOADED_FROM = 1.5
"""An overloaded rank is taken if each of the others scores more than so many times as much. A rank whose
next prompt is too long for what is left of its KV cache has a queue that grows, and is not overloaded. Where all
others are, it got every request: with caches of 400,000 tokens on the Mooncake trace at 3x (8 seeds) the mean time
to first token falls from 0.63 to 0.60 of vLLM's with this rule, in lockstep the p99 from 1.26 to 1.14."""
_NEVER_NS = 1 << 63
_PS_SHIFT, _DELAY_TOKENS = np.array(PS_SHIFT), np.array(DELAY_TOKENS)


class LeastWork(msgspec.Struct, frozen=True):
    """The least expected time to first token; the formula stands at the top of this module."""

    sees_work: ClassVar[bool] = True

    def __call__(self, view: View, request: Request) -> int:
        """See `dpshm.policies.Policy`."""
        columns = view.columns
        if isinstance(columns, ListColumns):
            return self._of_few(view, columns, request)
        work = columns.work
        if work is None or not work.models[0, 0]:
            return least_loaded(view, request)
        if request.cached is None and not work.lockstep:
            models = work.prepared or prepare_arrays(work.models)
            own = max(1, request.prompt_tokens)
            best = usual_of_many(models, columns.ranks, work.rows, own, work.now_ns)
            if best >= 0 and not is_overloaded(columns.load[best]):
                return best
        return columns.least(scores_of_many(columns, work, request), OVERLOADED_FROM)

    def _of_few(self, view: View, columns: ListColumns, request: Request) -> int:
        work = columns.work
        if work is None or not work.models[0][0]:
            return least_loaded(view, request)
        if request.cached is None and not work.lockstep:
            shared = (work.prepared or prepare(work.models)).shared
            if shared is not None:
                own = max(1, request.prompt_tokens)
                rows = columns.requests, work.tokens, work.steps
                best = usual_of_few(shared, columns.ranks, *rows, own, work.now_ns)
                if best >= 0 and not is_overloaded(columns.load[best]):
                    return best
        return columns.least(scores_of_few(columns, work, request), OVERLOADED_FROM)

    def expected_ns(self, view: View, request: Request) -> list[int]:
        """By rank, nanoseconds from now to this request's first token; if none has learnt, a count of requests."""
        columns = view.columns
        if isinstance(columns, ListColumns):
            return expected_of_few(columns, request)
        expected: list[int] = expected_of_many(columns, request).tolist()
        return expected


def scores_of_few(columns: ListColumns, work: ListWork, request: Request) -> list[int]:
    """By rank, what `LeastWork` compares, of few ranks that have learnt."""
    if work.lockstep:
        return lockstep_of_few(columns, request, expected_of_few(columns, request))
    return expected_of_few(columns, request, compared=True)


def expected_of_few(columns: ListColumns, request: Request, *, compared: bool = False) -> list[int]:
    """`LeastWork.expected_ns` of few ranks; if independent ranks are `compared`, with what that adds."""
    work = columns.work
    # A view of vLLM's broadcast has no tokens, and at first no engine has learnt anything: see `comparable`.
    if work is None or not work.models[0][0]:
        return [n + 1 for n in columns.requests]
    # In lockstep the step that runs ends for all at once: at no time is any of it left.
    now, own = _NEVER_NS if work.lockstep else work.now_ns, request.prompt_tokens
    # At least one token of a prompt is computed, whatever is cached.
    prompts = repeat(max(1, own)) if request.cached is None else [max(1, own - n) for n in request.cached]
    decode_steps = DECODE_STEPS if compared else 0
    scores = []
    # One item a rank in each; `strict` would cost a tenth of the decision.
    by_rank = zip(columns.requests, work.tokens, *work.steps, work.models, prompts)  # noqa: B905
    for requests, waiting, step_end, step_tokens, held, model, uncached in by_rank:
        base, per_request, per_token, chunk, max_running, ending, per_held = model
        base += per_request
        tokens = uncached
        if waiting > step_tokens:
            tokens += waiting - step_tokens
        load, context_ps = per_request * requests, per_held * (held + waiting)
        ns = base + load + decode_steps * load + (context_ps + decode_steps * context_ps >> PS_SHIFT)
        ns += per_token * tokens
        if compared:
            ns += (per_token * (uncached if uncached < DELAY_TOKENS else DELAY_TOKENS) >> DELAY_SHIFT) * requests
        load += context_ps >> PS_SHIFT
        if 0 < chunk < tokens:
            ns += (-(-tokens // chunk) - 1) * (base + load)
        if requests >= max_running:
            ns = max(ns, ending * (requests + 1 - max_running) + decode_steps * load)
        if step_end > now:
            ns += min(step_end - now, REST_STEPS * (base + per_token * step_tokens))
        scores.append(ns)
    if compared and request.cached is not None:
        return [ns - hit for ns, hit in zip(scores, request.cached, strict=False)]
    return scores


def scores_of_many(columns: ArrayColumns, work: ArrayWork, request: Request) -> Words:
    """`scores_of_few` for arrays."""
    if work.lockstep:
        return lockstep_of_many(columns, request, expected_of_many(columns, request))
    return _expected_of_many(work, request, compared=True)


def expected_of_many(columns: ArrayColumns, request: Request) -> Words:
    """`expected_of_few` for arrays."""
    work = columns.work
    if work is None or not work.models[0, 0]:
        return columns.requests + 1
    return _expected_of_many(work, request)


def _expected_of_many(work: ArrayWork, request: Request, *, compared: bool = False) -> Words:
    models, rows = work.prepared or prepare_arrays(work.models), work.rows
    requests, unseen, rest, terms = rows.requests, rows.unseen, rows.rest, rows.terms
    weights, own = models.compared if compared else models.alone, max(1, request.prompt_tokens)
    # Each call of numpy costs more than its arithmetic, and one with a Python number twice as much. So most of the
    # products and sums are one product of matrices.
    rows.subtract(work.now_ns)
    if work.lockstep:
        terms, weights = terms[:-1], weights[:-1]  # without `rest`
    else:
        np.minimum(rest, models.rest_base + models.rest_per_token * rows.step_tokens, out=rest)
    uncached = np.array(own)
    ns: Words = np.add.reduce(weights * terms, 0) if models.shared is None else weights.dot(terms)
    ns >>= _PS_SHIFT
    ns += models.base_and_request
    if request.cached is not None:
        uncached = np.maximum(uncached - np.array(request.cached), 1)
    ns += models.per_token * uncached
    if compared:
        ns += (models.per_token * np.minimum(uncached, _DELAY_TOKENS) >> DELAY_SHIFT) * requests
    # To look for a rank that meets a limit costs less than to divide.
    if models.least_chunk < NO_LIMIT and unseen[unseen.argmax()] + own > models.least_chunk:
        steps = (unseen + uncached + models.chunk_less_one) // models.chunk
        ns += (steps - 1) * (models.base_and_request + _load(models, rows))
    if models.least_running < NO_LIMIT and requests[requests.argmax()] >= models.least_running:
        wait = models.ending * (requests - models.running_less_one)
        wait += DECODE_STEPS * compared * _load(models, rows)
        if not work.lockstep:
            wait += rest
        np.maximum(ns, wait, out=ns)
    if compared and request.cached is not None:
        ns -= np.array(request.cached, np.int64)
    return ns


def _load(models: PreparedArrays, rows: ArrayRows) -> Words:
    load: Words = models.per_held * (rows.held + rows.tokens)
    load >>= _PS_SHIFT
    load += models.per_request * rows.requests
    return load
