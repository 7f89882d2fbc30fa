"""Learnt step models as decisions need them: what follows from them is worked out once, until they change.

A front-end reads the step models ten times a second, and decides as often as requests come. So a decision
(`dpshm.policies.work`) is given what can be known before it: the coefficients, if all ranks share them, and
whether any rank has a limit at all.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.int64]

NO_LIMIT = 1 << 40
"""Tokens or requests, where a rank has met no limit."""
PS_SHIFT = 10
"""From picoseconds to nanoseconds, near enough."""
DECODE_STEPS = 16
"""So many steps in which the request decodes count beside its wait. Outputs have more, but the wait for the first
token is felt as such. bench/ROUTING.md has 0 to 64."""
DELAY_SHIFT = 3
"""The delay of others counts as an eighth. Counted in full it would send long prompts to ranks with few requests
whatever waits there. An eighth decides between ranks at which this request would wait about equally long."""
DELAY_TOKENS = 1 << 13
"""A longer prompt counts as so many in the delay of others. Counted whole it goes where few run, and waits there
for seconds more."""
REST_STEPS = 4
"""The rest of a running step counts as at most so many steps of its kind: neither a clock that jumps nor a damaged
word keeps a rank out of routing."""


class Shared(NamedTuple):
    """What all ranks have in common, for `dpshm.policies.usual`.

    Attributes:
        per_request, per_held_ps: what a request and a held token add, to the wait and to `DECODE_STEPS` steps.
        per_token: what a prompt token adds.
        rest, rest_per_token: the most that is left of a running step, and what each of its prompt tokens adds.
        chunk, running: limits below which no rank meets one.
    """

    per_request: int
    per_held_ps: int
    per_token: int
    rest: int
    rest_per_token: int
    chunk: int
    running: int


class Prepared(msgspec.Struct, eq=False, gc=False):
    """Models of few ranks, prepared.

    Attributes:
        shared: what follows from the coefficients, if all ranks have the same.
    """

    shared: Shared | None


class PreparedArrays(Prepared, eq=False, gc=False):
    """Models of many ranks, prepared: arrays by rank beside the same.

    Attributes:
        least_chunk, least_running: the least over the ranks.
        alone, compared: what the `terms` of `dpshm.policies.columns.ArrayRows` count in picoseconds, of shape (5,)
            if all ranks share it and else (5, ranks): in the wait, and where ranks are compared.
    """

    least_chunk: int
    least_running: int
    base_and_request: Words
    per_request: Words
    per_token: Words
    per_held: Words
    chunk: Words
    chunk_less_one: Words
    running_less_one: Words
    ending: Words
    rest_base: Words
    rest_per_token: Words
    alone: Words
    compared: Words


def prepare(models: list[list[int]]) -> Prepared:
    """Models of few ranks; from what `dpshm.policies.comparable` gives."""
    if not models or not models[0][0]:
        return Prepared(None)
    base, per_request, per_token, chunk, running, _, per_held = zip(*models, strict=True)
    if not all(len(set(column)) == 1 for column in (base, per_request, per_token, per_held)):
        return Prepared(None)
    limits = min(n if n > 0 else NO_LIMIT for n in chunk), min(running)
    return Prepared(_shared([base[0], per_request[0], per_token[0], per_held[0]], *limits))


def _shared(coefficients: list[int], chunk: int, running: int) -> Shared:
    base, per_request, per_token, per_held = coefficients
    return Shared(
        per_request=(1 + DECODE_STEPS) * per_request,
        per_held_ps=(1 + DECODE_STEPS) * per_held,
        per_token=per_token,
        rest=REST_STEPS * (base + per_request),
        rest_per_token=REST_STEPS * per_token,
        chunk=chunk,
        running=running,
    )


def prepare_arrays(models: Words) -> PreparedArrays:
    """Models of many ranks; from the array form of what `dpshm.policies.comparable` gives."""
    base, per_request, per_token, chunk, running, ending, per_held = np.ascontiguousarray(models.T)
    chunk = np.where(chunk > 0, chunk, NO_LIMIT)
    least_chunk, least_running = int(chunk.min()), int(running.min())
    columns = [base, per_request, per_token, per_held]
    firsts = [int(column[0]) for column in columns]
    shared = None
    if firsts[0] and all((column == first).all() for column, first in zip(columns, firsts, strict=True)):
        shared = _shared(firsts, least_chunk, least_running)
    one = np.full_like(base, 1 << PS_SHIFT)
    weights = [per_held, per_request << PS_SHIFT, per_held, per_token << PS_SHIFT, one]
    alone = np.array([row[0] for row in weights] if shared else weights)
    compared = alone.copy()
    compared[:3] *= 1 + DECODE_STEPS
    return PreparedArrays(
        shared=shared,
        least_chunk=least_chunk,
        least_running=least_running,
        base_and_request=base + per_request,
        per_request=per_request,
        per_token=per_token,
        per_held=per_held,
        chunk=chunk,
        chunk_less_one=chunk - 1,
        running_less_one=running - 1,
        ending=ending,
        rest_base=REST_STEPS * (base + per_request),
        rest_per_token=REST_STEPS * per_token,
        alone=alone,
        compared=compared,
    )
