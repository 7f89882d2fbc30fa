"""Tests of `dpshm.coordinator.connections`: whose connection each subscription is."""

from __future__ import annotations

import pytest

from dpshm.coordinator.connections import Connections


def connections(nameless=0, *names):
    """So many without a name, and one of each rank named."""
    made = Connections()
    for _ in range(nameless + len(names)):
        made.on_join(None)
    for name in names:
        made.on_join(name)
    return made


@pytest.mark.parametrize(
    ("made", "held", "ranks", "stock"),
    [
        (connections(), [False, False], 0, 0),
        (connections(2), [False, False], 2, 2),
        (connections(0, 0), [True, False], 1, 0),
        (connections(0, 0, 0), [True, False], 1, 0),  # a forked worker of rank 0 keeps its old connection
        (connections(0, 0, 1), [True, False], 1, 0),  # rank 1 died, and so did not its worker
        (connections(1, 0), [True, False], 2, 1),
        (connections(1, 0, 0), [True, False], 2, 1),
        (connections(1), [True, False], 1, 0),  # rank 0 has a row and vLLM's sockets
        (connections(2), [True, False], 2, 1),
        (connections(2), [True, True], 2, 0),
        (connections(5), [True, False], 2, 1),
        (connections(0, 0, 1), [True, True], 2, 0),
    ],
)
def test_each_rank_counts_once(made, held, ranks, stock):
    """Guards against one engine that counts as two ranks, and a rank that never existed."""
    assert (made.ranks(held), made.stock(held)) == (ranks, stock)


def test_what_left_does_not_count():
    """Guards against counts that only grow, and a count below zero, after which an engine too many is needed."""
    made = connections(0, 3, 3)
    made.on_leave(3)
    made.on_leave(None)
    assert (made.count, made.nameless) == (1, 0)
    assert made.ranks([False, False, False, True]) == 1
    made.on_leave(3)
    made.on_leave(None)
    assert made.ranks([False, False, False, True]) == 0
    made.on_leave(None)
    made.on_leave(3)
    assert (made.count, made.nameless) == (0, 0)
    made = connections(2, 1)
    made.on_disconnect()
    assert (made.count, made.nameless) == (0, 0)
