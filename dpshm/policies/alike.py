"""Which ranks count as equally fast, and the step models by which decisions compare them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

from dpshm.board.layout import MODEL_WORDS
from dpshm.policies.prepared import NO_LIMIT

LIKE = 1.25
"""Ranks whose reference steps differ by no more than this factor are taken to be equal. A learnt step time is off
by some hundredths where equal steps vary by half. A rank that is slower by less loses little by being taken for
equal."""
REQUEST_TOKENS = 1024
"""Tokens of context as which a request counts at most, in lockstep. To schedule and sample a request takes some
tens of microseconds, and to read a token of context tens of nanoseconds (`dpshm.sim.step_cost`)."""
_ZEROS = repeat(0)
_REFERENCE_BATCH, _REFERENCE_TOKENS, _REFERENCE_HELD = 16, 512, 16 * 1024
COEFFICIENTS = tuple(map(MODEL_WORDS.index, ("base_ns", "per_request_ns", "per_token_ns", "per_held_token_ps")))
"""Places of what a step takes, among the words of a model."""


def comparable(
    models: list[list[int]],
    *,
    lockstep: bool = False,
    idle: Sequence[bool] = (),
    running: Sequence[int] = (),
    held: Sequence[int] = (),
) -> list[list[int]]:
    """Learnt models as decisions compare ranks by them, or all zero if none has learnt.

    What a rank learns of noisy steps is noisy, and a decision that believes small differences sends equal ranks
    unequal shares. So each rank gets the mean coefficients of the ranks that are like it, itself among them:
    those whose reference step takes at most `LIKE` times as long, or as short. A rank that really is slow is like
    no other and keeps its own. One that has learnt nothing, or has been idle for long
    (`dpshm.policies.idle_ranks`), gets the mean of the others.

    What an engine has never met, a full step or a full batch, gets a limit that is never reached.

    Ranks in lockstep wait for each other, so all see equally long steps, and each explains their length by what it
    holds itself: a rank with twice the others' batch learns that a request costs half as much, and would get more.
    So all of them get the mean. Nor can they tell requests from their context: the two grow together, and the step
    is as long as that of a rank whose context they do not know. Their sum is known. It is shared out so that a
    request counts as at most `REQUEST_TOKENS` tokens of context.

    Args:
        models: by rank the words of `dpshm.board.layout.MODEL_WORDS`, as published; they are not trusted.
        lockstep: whether the ranks step together.
        idle: by rank, whether what it has learnt may be out of date; empty: no rank is.
        running: by rank, requests that run; used in lockstep alone, as `held`.
        held: by rank, tokens of their context.
    """
    if any(idle) and not all(idle):
        without = [[0, *model[1:]] if old else model for model, old in zip(models, idle, strict=False)]
        models = without if any(model[0] > 0 for model in without) else models
    learnt = [model for model in models if model[0] > 0]
    if not learnt:
        return [[0] * len(MODEL_WORDS) for _ in models]
    mean = [sum(model[i] for model in learnt) // len(learnt) for i in COEFFICIENTS]
    if lockstep:
        mean[1], mean[3] = shared_out(
            mean[1], mean[3], sum(map(max, running, _ZEROS)), sum(map(max, held, _ZEROS))
        )
        alike = dict.fromkeys(map(_reference_ns, learnt), mean)
    else:
        alike = _means_of_alike(sorted((_reference_ns(model), model) for model in learnt))
    found = []
    for model in models:
        base, per_request, per_token, per_held = alike[_reference_ns(model)] if model[0] > 0 else mean
        chunk = model[3] if model[3] > 0 else NO_LIMIT
        limits = (model[4], model[5]) if model[4] > 0 else (NO_LIMIT, 0)
        found.append([base, per_request, per_token, chunk, *limits, per_held])
    return found


def shared_out(per_request_ns: int, per_held_ps: int, running: int, held: int) -> tuple[int, int]:
    """The two coefficients of decoding with the same sum, such that a request counts as few enough tokens."""
    if not held or per_request_ns <= REQUEST_TOKENS * per_held_ps >> 10:
        return per_request_ns, per_held_ps
    total_ps = (per_request_ns * running << 10) + per_held_ps * held
    per_held_ps = total_ps // (held + REQUEST_TOKENS * running)
    return REQUEST_TOKENS * per_held_ps >> 10, per_held_ps


def _reference_ns(model: list[int]) -> int:
    found: int = reference_ns([max(0, word) for word in model])
    return found


def reference_ns(model: Any) -> Any:
    """How long a step of some requests with some context, and of some prompt tokens, takes.

    Args:
        model: of one rank, words that are not negative; or columns of many.
    """
    return (
        model[0] + _REFERENCE_BATCH * model[1] + _REFERENCE_TOKENS * model[2] + (_REFERENCE_HELD * model[6] >> 10)
    )


def _means_of_alike(models: list[tuple[int, list[int]]]) -> dict[int, list[int]]:
    """By reference time, the mean coefficients of the models whose times are alike; they come sorted."""
    found: dict[int, list[int]] = {}
    first = end = 0
    sums = [0] * len(COEFFICIENTS)
    for reference, _ in models:
        while end < len(models) and models[end][0] <= reference * LIKE:
            sums = [total + models[end][1][i] for total, i in zip(sums, COEFFICIENTS, strict=True)]
            end += 1
        while models[first][0] * LIKE < reference:
            sums = [total - models[first][1][i] for total, i in zip(sums, COEFFICIENTS, strict=True)]
            first += 1
        found[reference] = [total // (end - first) for total in sums]
    return found
