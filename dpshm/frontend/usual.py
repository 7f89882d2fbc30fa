"""The usual decision of `least_work` as one function: it reads what it needs, and chooses.

A view holds more than that, and to make one costs a third of a decision. So the front-end makes such a function
at each refresh and asks it first. It makes a view where the function says -1 (`dpshm.policies.usual`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from dpshm.board.outstanding import OutstandingWork, Words
from dpshm.board.words import KV_ONE
from dpshm.frontend.turns import Turns
from dpshm.policies.columns import OVERLOADED_KV, ArrayRows, is_overloaded
from dpshm.policies.prepared import PreparedArrays, Shared
from dpshm.policies.usual import usual_of_few, usual_of_many

Usual: TypeAlias = Callable[[int, int], int]
"""What `least_work` chooses for so many prompt tokens at a time (CLOCK_MONOTONIC ns); -1: it needs a view."""


class Reads(NamedTuple):
    """What such a function reads.

    Attributes:
        turns: of the ranks that may be chosen.
        steps: the board's words, shape (3, ranks).
        outstanding: counts requests and tokens.
        load: the board's words of load.
        clocks_agree: whether the ends of steps are known.
    """

    turns: Turns
    steps: Words
    outstanding: OutstandingWork
    load: memoryview
    clocks_agree: bool


def of_few(shared: Shared, reads: Reads) -> Usual:
    """For few ranks; `shared` follows from the step models."""
    turns, steps, outstanding, load, clocks_agree = reads
    read_steps, count, orders = steps.tolist, outstanding.counter(), turns.orders
    no_ends = None if clocks_agree else [0] * steps.shape[1]

    def usual(prompt_tokens: int, now_ns: int) -> int:
        by_rank = read_steps()
        if no_ends is not None:
            by_rank[0] = no_ends
        requests, tokens = count().tolist()
        ranks = turns.current = next(orders)
        best = usual_of_few(shared, ranks, requests, tokens, by_rank, prompt_tokens or 1, now_ns)
        word = load[best]
        return -1 if word & KV_ONE > OVERLOADED_KV and is_overloaded(word) else best

    return usual


def of_many(models: PreparedArrays, reads: Reads) -> Usual:
    """For many ranks."""
    turns, steps, outstanding, load, clocks_agree = reads
    rows, orders = ArrayRows(steps.shape[1]), turns.orders
    own_steps, count = rows.steps, outstanding.counter_into(rows.counts)

    def usual(prompt_tokens: int, now_ns: int) -> int:
        # SYNC: an assignment from columns whose words lie apart (here 128 bytes) moves word by word.
        own_steps[:] = steps
        if not clocks_agree:
            rows.ends[:] = 0
        count()
        ranks = turns.current = next(orders)
        best = usual_of_many(models, ranks, rows, prompt_tokens or 1, now_ns)
        word = load[best]
        return -1 if word & KV_ONE > OVERLOADED_KV and is_overloaded(word) else best

    return usual
