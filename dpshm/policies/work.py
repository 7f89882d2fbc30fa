"""`LeastWork`: the engine that will have computed this prompt first, in nanoseconds.

What a new request waits for, at an engine that serves first come, first served with chunked prefill:

    seconds = rest of the step that runs now (at most `REST_STEPS` times what such a step takes)
            + the longer of
                steps * (base + per_request * (requests + 1)) + per_token * tokens
                ending * (requests + 1 - max_running)

    tokens = sent and not computed - those of the running step + its own that are not cached
    steps = ceil(tokens / chunk)

That is what this request waits. But each prompt token that is computed also delays the requests that are running
there, so a sixteenth of that delay is added before ranks are compared:

    per_token * own tokens that are not cached * requests / 16

Without it long prompts meet on ranks with many running requests, whose tokens then come late: on the Azure code
trace at 10x the time per output token was 85 ms; with it, it is 78, and the first token comes no later.

Of ranks with equal times the one that has more of the prompt cached is taken: a cached token counts as one
nanosecond, a ten-thousandth of what it takes to compute one.

The first is the work in front of it. The second is the wait for room, if that many requests have to end first.

All of it stands on the board. The counts are reported plus in flight. ``base``, ``per_request``, ``per_token``,
``chunk``, ``max_running`` and ``ending`` are what each engine has learnt of its own steps
(`dpshm.policies.step_model`), so an engine that is slow, or of another kind, or slows down, is seen as what it
is, and nothing has to be tuned. An engine that has learnt nothing yet, because it has just started or is a stock
one, is taken to be like the mean of those that have. If none has, or the view has no tokens, requests are
counted, as `least_loaded` does.

Source: the idea that a request should go where the *work* in front of it, not the number of requests, is least
is old: Harchol-Balter, Crovella, Murta, "On choosing a task assignment policy for a distributed server system",
JPDC 59(2), 1999 (least work remaining). The estimate of that work is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import ClassVar

import msgspec
import numpy as np

from dpshm.board.layout import MODEL_WORDS
from dpshm.policies.columns import ArrayColumns, ListColumns, PreparedModels, Words
from dpshm.policies.counts import least_loaded
from dpshm.policies.view import Request, View

LIKE = 1.25
"""Ranks whose reference steps differ by no more than this factor are taken to be equal. A learnt step time is off
by some hundredths where equal steps vary by half. A rank that is slower by less loses little by being taken for
equal."""
_REFERENCE_BATCH, _REFERENCE_TOKENS = 16, 512
REST_STEPS = 4
"""The rest of a running step counts as at most so many steps of its kind: neither a clock that jumps nor a damaged
word keeps a rank out of routing."""
_REST_STEPS_ARRAY = np.array(REST_STEPS)
DELAY_SHIFT = 4
"""The delay of others counts as a sixteenth. Counted in full it would send long prompts to ranks with few requests
whatever waits there. A sixteenth decides between ranks at which this request would wait about equally long."""
_DELAY_SHIFT_ARRAY = np.array(DELAY_SHIFT)
OVERLOADED_FROM = 1.5
"""An overloaded rank is taken if the wait at each of the others is more than so many times as long. A rank whose
next prompt is too long for what is left of its KV cache has a queue that grows, and is not overloaded. Where all
others are, it got every request: with caches of 400,000 tokens on the Mooncake trace at 3x (8 seeds) the mean time
to first token falls from 0.63 to 0.60 of vLLM's with this rule, in lockstep the p99 from 1.26 to 1.14."""
_LOOK_FROM = 256
_NO_LIMIT = 1 << 40
"""Tokens or requests."""


class LeastWork(msgspec.Struct, frozen=True):
    """The least expected time to first token; the formula stands at the top of this module."""

    sees_work: ClassVar[bool] = True

    def __call__(self, view: View, request: Request) -> int:
        """See `dpshm.policies.Policy`."""
        columns = view.columns
        if isinstance(columns, ListColumns):
            if columns.work is None or not columns.work.models[0][0]:
                return least_loaded(view, request)
            return columns.least(expected_of_few(columns, request, compared=True), OVERLOADED_FROM)
        if columns.work is None or not columns.work.models[0, 0]:
            return least_loaded(view, request)
        return columns.least(expected_of_many(columns, request, compared=True), OVERLOADED_FROM)

    def expected_ns(self, view: View, request: Request) -> list[int]:
        """By rank, nanoseconds from now to this request's first token; if none has learnt, a count of requests."""
        columns = view.columns
        if isinstance(columns, ListColumns):
            return expected_of_few(columns, request)
        expected: list[int] = expected_of_many(columns, request).tolist()
        return expected


def expected_of_few(columns: ListColumns, request: Request, *, compared: bool = False) -> list[int]:
    """`LeastWork.expected_ns` of few ranks; if they are `compared`, with the delay of others and the tie-break."""
    work = columns.work
    # A view of vLLM's broadcast has no tokens, and at first no engine has learnt anything: see `comparable`.
    if work is None or not work.models[0][0]:
        return [n + 1 for n in columns.requests]
    now, own = work.now_ns, request.prompt_tokens
    # At least one token of a prompt is computed, whatever is cached.
    prompts = repeat(max(1, own)) if request.cached is None else [max(1, own - n) for n in request.cached]
    scores = []
    # One item a rank in each; `strict` would cost a tenth of the decision.
    by_rank = zip(columns.requests, work.tokens, work.steps, work.models, prompts)  # noqa: B905
    for requests, waiting, (step_end, step_tokens), model, uncached in by_rank:
        base, per_request, per_token, chunk, max_running, ending = model
        tokens = uncached
        if waiting > step_tokens:
            tokens += waiting - step_tokens
        ns = alone = base + per_request * (requests + 1)
        if 0 < chunk < tokens:
            ns *= -(-tokens // chunk)
        if compared:
            tokens += uncached * requests >> DELAY_SHIFT
        ns += per_token * tokens
        if requests >= max_running and (wait := ending * (requests + 1 - max_running)) > ns:
            ns = wait
        if (rest := step_end - now) > 0:
            most = REST_STEPS * (alone + per_token * step_tokens)
            ns += rest if rest < most else most
        scores.append(ns)
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
    ns: Words = models.per_request * requests
    ns += models.base_and_request
    most = models.per_token * step_tokens
    most += ns
    most *= _REST_STEPS_ARRAY
    # To divide many costs more than to look whether any has to be divided.
    if models.least_chunk < _NO_LIMIT and (
        len(tokens) < _LOOK_FROM or np.maximum.reduce(tokens) > models.least_chunk
    ):
        ns *= (tokens + models.chunk_less_one) // models.chunk
    if compared:
        delay = own * requests
        delay >>= _DELAY_SHIFT_ARRAY
        tokens += delay
    tokens *= models.per_token
    ns += tokens
    if models.least_running < _NO_LIMIT:
        wait = requests - models.running_less_one
        wait *= models.ending
        np.maximum(ns, wait, out=ns)
    now = np.array(work.now_ns)
    rest = np.maximum(steps[:, 0], now)
    rest -= now
    np.minimum(rest, most, out=rest)
    ns += rest
    if compared and request.cached is not None:
        ns -= np.array(request.cached, np.int64)
    return ns


def prepare(models: Words) -> PreparedModels:
    """Models of many ranks as decisions need them; from the array form of what `comparable` gives."""
    base, per_request, per_token, chunk, max_running, ending = np.ascontiguousarray(models.T)
    least = int(chunk.min()), int(max_running.min())
    return PreparedModels(
        base + per_request, per_request, per_token, chunk, chunk - 1, max_running - 1, ending, *least
    )


def comparable(models: list[list[int]], *, lockstep: bool = False, idle: Sequence[bool] = ()) -> list[list[int]]:
    """Learnt models as decisions compare ranks by them, or all zero if none has learnt.

    What a rank learns of noisy steps is noisy, and a decision that believes small differences sends equal ranks
    unequal shares. So each rank gets the mean coefficients of the ranks that are like it, itself among them:
    those whose reference step takes at most `LIKE` times as long, or as short. A rank that really is slow is like
    no other and keeps its own. One that has learnt nothing, or has been idle for long
    (`dpshm.policies.idle_ranks`), gets the mean of the others.

    What an engine has never met, a full step or a full batch, gets a limit that is never reached.

    Ranks in lockstep wait for each other, so all see equally long steps, and each explains their length by what it
    holds itself: a rank with twice the others' batch learns that a request costs half as much, and would get more.
    So all of them get the mean.

    Args:
        models: by rank the words of `dpshm.board.layout.MODEL_WORDS`, as published; they are not trusted.
        lockstep: whether the ranks step together.
        idle: by rank, whether what it has learnt may be out of date; empty: no rank is.
    """
    if any(idle) and not all(idle):
        without = [[0, 0, 0, *model[3:]] if old else model for model, old in zip(models, idle, strict=False)]
        models = without if any(model[0] > 0 for model in without) else models
    learnt = [model for model in models if model[0] > 0]
    if not learnt:
        return [[0] * len(MODEL_WORDS) for _ in models]
    mean = [sum(model[i] for model in learnt) // len(learnt) for i in range(3)]
    if lockstep:
        alike = dict.fromkeys(map(_reference_ns, learnt), mean)
    else:
        alike = _means_of_alike(sorted((_reference_ns(model), model) for model in learnt))
    return [
        [
            *(alike[_reference_ns(model)] if model[0] > 0 else mean),
            model[3] if model[3] > 0 else _NO_LIMIT,
            *((model[4], model[5]) if model[4] > 0 else (_NO_LIMIT, 0)),
        ]
        for model in models
    ]


def _reference_ns(model: list[int]) -> int:
    """How long a step of some requests and some prompt tokens takes."""
    return model[0] + _REFERENCE_BATCH * max(0, model[1]) + _REFERENCE_TOKENS * max(0, model[2])


def _means_of_alike(models: list[tuple[int, list[int]]]) -> dict[int, list[int]]:
    """By reference time, the mean coefficients of the models whose times are alike; they come sorted."""
    found: dict[int, list[int]] = {}
    first = end = 0
    sums = [0, 0, 0]
    for reference, _ in models:
        while end < len(models) and models[end][0] <= reference * LIKE:
            sums = [total + x for total, x in zip(sums, models[end][1], strict=False)]
            end += 1
        while models[first][0] * LIKE < reference:
            sums = [total - x for total, x in zip(sums, models[first][1], strict=False)]
            first += 1
        found[reference] = [total // (end - first) for total in sums]
    return found
