"""Ranks in lockstep: a request goes where it lengthens the steps of the whole group least.

A step of the group lasts as long as that of its slowest rank. What ranks differ by is the prompt tokens that they
compute and, in every step, the context that their requests hold. So what counts of a rank is how far the request
would raise the most of all ranks:

    longer by prefill = per_token * (its backlog + own tokens that are not cached - the most backlog of a rank)
    longer by decode  = decode load with the request - the most decode load of a rank
    decode load = per_request * requests + per_held_token * (held tokens + tokens sent and not computed)

each at least 0. Prompts of several ranks are computed in the same steps, so a prompt that is no longer than the
most backlog costs the group nothing. The first is felt once, the second in every step of the request's life, of
which `DECODE_STEPS` count. Both are felt by all requests of the group, and the wait for its own first token
(`dpshm.policies.work`) by this one alone: it counts an eighth, and decides where nothing gets longer.

Sources: that the most loaded rank is what counts is the classic of scheduling parallel machines, Graham, "Bounds
on multiprocessing timing anomalies", SIAM J. Appl. Math. 17(2), 1969; for decode in lockstep, "BalanceRoute",
arXiv 2605.06113, 2026, which places requests by a similar margin below the most loaded rank. The two parts and
their weights are ours.
"""

from __future__ import annotations

import numpy as np

from dpshm.policies.columns import ArrayColumns, ListColumns
from dpshm.policies.prepared import PS_SHIFT, Words
from dpshm.policies.view import Request

DECODE_STEPS = 64
"""Steps of its life for which a request's decode load counts. bench/ROUTING.md has 16 to 1024."""
OWN_SHIFT = 3
"""The wait of the request itself counts as an eighth."""
_PREFILL_WEIGHT = 1 << OWN_SHIFT
_DECODE_WEIGHT = DECODE_STEPS << OWN_SHIFT
_PREFILL_ARRAY, _DECODE_ARRAY, _PS_SHIFT_ARRAY, _ZERO = map(
    np.array, (_PREFILL_WEIGHT, _DECODE_WEIGHT, PS_SHIFT, 0)
)


def lockstep_of_few(columns: ListColumns, request: Request, waits: list[int]) -> list[int]:
    """What decisions compare, of few ranks.

    Args:
        columns: of ranks that have learnt; all have the same coefficients, as `comparable` gives them in lockstep.
        request: the request.
        waits: by rank, nanoseconds to the request's first token.
    """
    work = columns.work
    assert work is not None
    _, per_request, per_token, _, _, _, per_held = work.models[0]
    _, step_tokens, held = work.steps
    backlogs = [
        waiting - computed if waiting > computed else 0
        for waiting, computed in zip(work.tokens, step_tokens, strict=False)
    ]
    loads = [
        per_request * requests + (per_held * (context + waiting) >> PS_SHIFT)
        for requests, waiting, context in zip(columns.requests, work.tokens, held, strict=False)
    ]
    own = max(1, request.prompt_tokens)
    backlog_left = max(backlogs) - own
    load_left = max(loads) - per_request - (per_held * own >> PS_SHIFT)
    cached = request.cached or [0] * len(waits)
    scores = []
    for wait, backlog, load, hit in zip(waits, backlogs, loads, cached, strict=False):
        score = wait - hit
        if (longer := backlog - backlog_left - hit) > 0:
            score += per_token * longer * _PREFILL_WEIGHT
        if (longer := load - load_left) > 0:
            score += longer * _DECODE_WEIGHT
        scores.append(score)
    return scores


def lockstep_of_many(columns: ArrayColumns, request: Request, waits: Words) -> Words:
    """The same for arrays; `waits` is used up."""
    work = columns.work
    assert work is not None
    _, per_request, per_token, _, _, _, per_held = work.models[0]
    _, step_tokens, held = work.steps
    own = np.array(max(1, request.prompt_tokens))
    backlog = np.maximum(work.tokens, step_tokens)
    backlog -= step_tokens
    backlog -= np.maximum.reduce(backlog) - own
    load: Words = held + work.tokens
    load *= per_held
    load >>= _PS_SHIFT_ARRAY
    load += columns.requests * per_request
    load -= np.maximum.reduce(load) - per_request - (per_held * own >> _PS_SHIFT_ARRAY)
    if request.cached is not None:
        cached = np.array(request.cached, np.int64)
        backlog -= cached
        waits -= cached
    np.maximum(backlog, _ZERO, out=backlog)
    backlog *= per_token * _PREFILL_ARRAY
    np.maximum(load, _ZERO, out=load)
    load *= _DECODE_ARRAY
    waits += backlog
    waits += load
    return waits
