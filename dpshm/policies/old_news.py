"""A policy where the rows of some ranks are old: those of other nodes, which come through a relay.

When many front-ends decide from the same old news, each sends its request to the rank that looked best, and all to
the same one. So of ranks whose rows are old only two are compared, drawn at random by each decision, beside those
whose rows are not (Mitzenmacher, "How Useful Is Old Information?", IEEE TPDS 11(1), 2000). What was booked since
counts at all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpshm.policies.columns import ArrayColumns, Columns, Words
from dpshm.policies.view import Policy, Request, View
from dpshm.rules.hashing import mix

DRAWN = 2
"""However little the news are late: 0.1 ms is enough for 512 front-ends to choose the same. The figures of the
laboratory are in bench/ROUTING.md (Nodes)."""


class OldNews:
    """A policy that sees how old rows are (`View.ages_ns`), and of old ones but two.

    Args:
        policy: chooses among the ranks that are left.
        ages_ns: by rank, how old its row may be; 0 for a rank of this node, whose row is never old.
        draws: false shows all ranks: for ranks in lockstep, which are one machine, or a policy that does not look
            for the least.
    """

    def __init__(self, policy: Policy, ages_ns: list[int], *, draws: bool) -> None:
        self._policy, self._ages_ns = policy, ages_ns
        self._old = frozenset(e for e, age_ns in enumerate(ages_ns) if age_ns > 0) if draws else frozenset()
        self._is_old = np.array([e in self._old for e in range(len(ages_ns))])

    def __call__(self, view: View, request: Request) -> int:
        """See `dpshm.policies.Policy`."""
        columns = view.columns
        columns.ages_ns = self._ages_ns
        if self._old and isinstance(columns, ArrayColumns):
            ranks = columns.ranks
            is_old = self._is_old[ranks]
            old = ranks[is_old]
            if len(old) > DRAWN:
                is_old[np.flatnonzero(is_old)[list(_draw(old, columns, request))]] = False
                columns.ranks = ranks[~is_old]
        elif self._old:
            few = [rank for rank in columns.ranks if rank in self._old]
            if len(few) > DRAWN:
                drawn = {few[i] for i in _draw(few, columns, request)}
                columns.ranks = [rank for rank in columns.ranks if rank not in self._old or rank in drawn]
        return self._policy(view, request)


def _draw(old: Sequence[int] | Words, columns: Columns, request: Request) -> tuple[int, int]:
    """The places of two different ones of these ranks: a hash of the view, as a decision is a function of it."""
    n, at = len(old), int(old[0])
    drawn = columns.work.now_ns if columns.work is not None else 0
    # The order of ranks turns with every decision and what a rank has changes, so the draw does too.
    for word in (at, request.prompt_tokens, int(columns.requests[at]), sum(columns.own), int(columns.load[at])):
        drawn = mix(drawn ^ word)
    first = drawn % n
    return first, (first + 1 + (drawn >> 32) % (n - 1)) % n
