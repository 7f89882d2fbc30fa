"""`dpshm.policies.comparable` of many ranks: the same rules in arrays. A front-end asks ten times a second."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpshm.board.layout import MODEL_WORDS
from dpshm.policies.alike import COEFFICIENTS, LIKE, reference_ns, shared_out
from dpshm.policies.prepared import NO_LIMIT, Words

_PLACES = np.array(COEFFICIENTS)
_MOST = 1 << 44
"""A larger word is damaged (five hours for a step), and would overflow a sum: it counts as this."""


def comparable_of_many(
    models: Words, *, lockstep: bool, idle: NDArray[np.bool_], running: Words, held: Words
) -> Words:
    """Learnt models as decisions compare ranks by them, or all zero if none has learnt.

    Args:
        models: shape (ranks, 7), of `dpshm.board.layout.MODEL_WORDS`, as published; they are not trusted.
        lockstep: whether the ranks step together.
        idle: by rank, whether what it has learnt may be out of date.
        running: by rank, requests that run.
        held: by rank, tokens of their context.

    Returns:
        A new array of the same shape.
    """
    found: Words = np.zeros((len(models), len(MODEL_WORDS)), np.int64)
    models = models.copy()  # the board's words may change
    words = models.clip(-_MOST, _MOST)
    learnt = words[:, 0] > 0
    if (learnt & ~idle).any():
        learnt &= ~idle
    if not learnt.any():
        return found
    coefficients = words[:, _PLACES]
    mean = coefficients[learnt].sum(axis=0) // np.count_nonzero(learnt)
    if lockstep:
        context: list[int] = [int(np.maximum(column, 0).sum()) for column in (running, held)]
        mean[1], mean[3] = shared_out(int(mean[1]), int(mean[3]), *context)
    found[:, _PLACES] = mean
    if not lockstep:
        found[np.flatnonzero(learnt)[:, None], _PLACES] = _means_of_alike(words[learnt])
    found[:, 3] = np.where(words[:, 3] > 0, models[:, 3], NO_LIMIT)
    limited = words[:, 4] > 0
    found[:, 4] = np.where(limited, models[:, 4], NO_LIMIT)
    found[:, 5] = np.where(limited, models[:, 5], 0)
    return found


def _means_of_alike(models: Words) -> Words:
    """For each of these models, the mean coefficients of those whose reference steps are alike."""
    reference: Words = reference_ns(np.maximum(models, 0).T)
    order = reference.argsort(kind="stable")
    sorted_ns: Any = reference[order]
    first = np.searchsorted(sorted_ns * LIKE, sorted_ns, side="left")
    end = np.searchsorted(sorted_ns, sorted_ns * LIKE, side="right")
    sums = np.zeros((len(models) + 1, len(_PLACES)), np.int64)
    models[order[:, None], _PLACES].cumsum(axis=0, out=sums[1:])
    means = np.empty((len(models), len(_PLACES)), np.int64)
    means[order] = (sums[end] - sums[first]) // (end - first)[:, None]
    return means
