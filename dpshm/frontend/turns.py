"""In which order a front-end looks at ranks: it turns by one with every decision.

A policy takes the first of several equal ranks. So ties are broken fairly, and differently in each front-end.
"""

from __future__ import annotations

from itertools import cycle
from math import gcd
from typing import Any

import numpy as np

GOLDEN_RATIO = (5**0.5 + 1) / 2


def first_turn(number: int, count: int) -> int:
    """Where the front-end of that number begins among so many ranks.

    Of any `count` numbers in a row, each has another place. Neighbours begin far apart: the distance is the one
    nearest to the golden section that has no divisor in common with the number of ranks.
    """
    apart = min(
        (distance for distance in range(1, count + 1) if gcd(distance, count) == 1),
        key=lambda distance: abs(distance - count / GOLDEN_RATIO),
    )
    return number * apart % count


class Turns:
    """The orders of some ranks, one for each decision.

    Attributes:
        ranks: the ranks.
        orders: endless; each order begins one rank later than the one before it. All of them share one array.
        current: the newest order that was taken.
    """

    __slots__ = ("current", "orders", "ranks")

    def __init__(self, ranks: list[int], number: int, *, arrays: bool) -> None:
        """Begins where the front-end of that number does.

        Args:
            ranks: at least one.
            number: of the front-end; another number begins elsewhere.
            arrays: whether an order is an array of int64, and not a list.
        """
        self.ranks, count = ranks, len(ranks)
        twice: Any = np.array(ranks * 2) if arrays else ranks * 2
        first = first_turn(number, count) + 1
        turns = [twice[turn % count : turn % count + count] for turn in range(first, first + count)]
        self.orders = cycle(turns)
        self.current: Any = turns[-1]
