"""The usual decision of `least_work`, without what only the others need.

Usual: independent ranks that count as equally fast (`dpshm.policies.comparable`), nothing known to be cached, and
a best rank that meets no limit. A score is a sum of a few products then, and what all ranks have in common is left
out. Limits only add to a score. So the rank with the least score is the choice if it meets none itself, whatever
others meet.

Both functions give -1 where the decision is not usual. The whole formula (`dpshm.policies.work`) decides then.
"""

from __future__ import annotations

import numpy as np

from dpshm.policies.columns import ArrayRows
from dpshm.policies.prepared import DELAY_SHIFT, DELAY_TOKENS, PS_SHIFT, PreparedArrays, Shared, Words

_NO_SCORE = 1 << 100


def usual_of_few(  # noqa: PLR0917 - names in a call cost a twentieth of a microsecond
    shared: Shared,
    ranks: list[int],
    requests: list[int],
    tokens: list[int],
    steps: list[list[int]],
    own: int,
    now_ns: int,
) -> int:
    """The choice among few ranks, or -1.

    Args:
        shared: what follows from the step models.
        ranks: those that may be chosen, in the order that breaks ties; never empty.
        requests: by rank; this and the next two as `dpshm.policies.columns.ListWork` has them.
        tokens: by rank.
        steps: three columns by rank.
        own: prompt tokens of the request, at least 1.
        now_ns: CLOCK_MONOTONIC.
    """
    per_request, per_held, per_token, most, rest_per_token, chunk, running = shared
    if own > chunk:
        return -1
    per_request += per_token * (own if own < DELAY_TOKENS else DELAY_TOKENS) >> DELAY_SHIFT
    late_ns = now_ns + most
    ends, computed, held = steps
    best, least = -1, _NO_SCORE
    for rank in ranks:
        score = per_request * requests[rank]
        if score < least:  # the rest only adds to it
            waiting, of_step, end = tokens[rank], computed[rank], ends[rank]
            score += per_held * (held[rank] + waiting) >> PS_SHIFT
            if waiting > of_step:
                score += per_token * (waiting - of_step)
            if end > now_ns:
                score += end - now_ns if end <= late_ns else min(end - now_ns, most + rest_per_token * of_step)
            if score < least:
                least, best = score, rank
    if requests[best] >= running or own + tokens[best] - computed[best] > chunk:
        return -1
    return best


def usual_of_many(models: PreparedArrays, ranks: Words, rows: ArrayRows, own: int, now_ns: int) -> int:
    """The choice among many ranks, or -1.

    Args:
        models: of all ranks.
        ranks: those that may be chosen, in the order that breaks ties; never empty.
        rows: steps and counts by rank; the rest is filled here.
        own: prompt tokens of the request, at least 1.
        now_ns: CLOCK_MONOTONIC.
    """
    shared = models.shared
    if shared is None or own > shared.chunk:
        return -1
    # Each call of numpy costs more than its arithmetic. So most of the products and sums are one of matrices, and
    # to look for a rank that meets a bound costs less than to apply it.
    rows.subtract(now_ns)
    rest, terms = rows.rest, rows.terms
    if rest.item(rest.argmax()) > shared.rest:
        np.minimum(rest, models.rest_base + models.rest_per_token * rows.step_tokens, out=rest)
    weights = models.compared.copy()
    delay = shared.per_token * (own if own < DELAY_TOKENS else DELAY_TOKENS) >> DELAY_SHIFT
    weights[1] = shared.per_request + delay << PS_SHIFT  # the row of requests
    best: int = ranks.item(weights.dot(terms)[ranks].argmin())
    if rows.requests.item(best) >= shared.running or rows.unseen.item(best) > shared.chunk - own:
        return -1
    return best
