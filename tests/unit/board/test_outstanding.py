"""`dpshm.board.outstanding`: what was sent and has not ended, from counts that each side keeps by itself."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from dpshm.board.outstanding import LiveOutstanding, Outstanding, OutstandingWork

SIZES = [1, 2, 8, 31, 32, 70]  # a product with ones below 32 columns, a sum over rows from there on


def columns(frontends, engines):
    """The table and ``received`` of nothing, each a part of a larger array as on the board."""
    return (
        np.zeros((frontends + 2, engines + 3), np.int64)[: 1 + frontends, :engines],
        np.zeros((engines, frontends + 2), np.int64)[:, :frontends],
    )


@pytest.mark.parametrize("engines", SIZES)
@pytest.mark.parametrize("frontends", [1, 4, 17])
def test_every_request_counts_once_until_it_ends(engines, frontends):
    """Guards against a transposed table, a wrong row, and a request that moves from one count into two or none."""
    random = Random(engines * 100 + frontends)
    table, received = columns(frontends, engines)
    outstanding = Outstanding(table, received, range(frontends))
    held = [0] * engines
    for _ in range(300):
        e, f = random.randrange(engines), random.randrange(frontends)
        match random.randrange(3):
            case 0:
                table[1 + f, e] += 1
            case 1 if received[e, f] < table[1 + f, e]:
                received[e, f] += 1
                held[e] += 1
            case 2 if held[e]:
                held[e] -= 1
        table[0, e] = held[e] - received[e].sum()
        expected = (table[1:] - received.T).sum(axis=0) + held
        assert outstanding.count().tolist() == expected.tolist()
        assert Outstanding(table, received, range(frontends)).count().tolist() == expected.tolist()


@pytest.mark.parametrize("engines", SIZES)
def test_what_a_dead_front_end_had_in_flight_does_not_count(engines):
    """Guards against bookings that are never taken back; requests that the engine received still count."""
    table, received = columns(3, engines)
    table[1:, 0] = 5, 6, 7
    received[0] = 4, 2, 7
    table[0, 0] = 3 - received[0].sum()
    assert Outstanding(table, received, [0, 1, 2]).count()[0] == 3 + 1 + 4
    assert Outstanding(table, received, [0, 2]).count()[0] == 3 + 1
    assert Outstanding(table, received, []).count()[0] == 3


@pytest.mark.parametrize("engines", SIZES)
def test_a_predecessors_late_message_hides_nobody(engines):
    """Guards against an engine that counted more than was sent, whose surplus would hide another's request."""
    table, received = columns(2, engines)
    table[1:, 0] = 1, 4
    received[0] = 3, 4
    table[0, 0] = 6 - received[0].sum()
    assert Outstanding(table, received, [0, 1]).count()[0] == 6


def test_each_count_is_of_its_instant():
    """Guards against a buffer that the next count writes over, or that keeps what the last one found."""
    table, received = columns(2, 2)
    outstanding = Outstanding(table, received, [0, 1])
    table[2, 0] = 3
    first = outstanding.count()
    table[0, 0] = -3
    assert (first.tolist(), outstanding.count().tolist()) == ([3, 0], [0, 0])


def test_without_front_ends_engines_requests_of_their_own_count():
    """Guards against a shape that an empty board does not have: only stock front-ends, which have no row."""
    table, received = columns(0, 3)
    table[0] = 2, 0, 0
    assert Outstanding(table, received, []).count().tolist() == [2, 0, 0]


@pytest.mark.parametrize("engines", SIZES)
def test_scribbled_words_raise_nothing(engines):
    """Guards against an overflow that would end a front-end's decision: shared memory is not trusted."""
    table, received = columns(2, engines)
    table[1:, 0] = (1 << 63) - 1
    received[0, :] = table[0] = -(1 << 63)
    assert len(Outstanding(table, received, [0]).count()) == engines


@pytest.mark.parametrize("kind", [Outstanding, LiveOutstanding])
@pytest.mark.parametrize("engines", SIZES)
def test_both_at_once_are_the_two(engines, kind):
    """Guards against requests that are counted as tokens, or one of the two without its correction."""
    random = Random(engines)
    tables = np.zeros((2, 5, engines + 3), np.int64)[:, :4, :engines]
    received = [np.zeros((engines, 3), np.int64) for _ in range(2)]
    for counted in ([0, 1, 2], [0, 2], []):
        for table, seen in zip(tables, received, strict=True):
            table[:] = [[random.randrange(-9, 99) for _ in range(engines)] for _ in range(4)]
            seen[:] = [[random.randrange(99) for _ in range(3)] for _ in range(engines)]
        each = [kind(table, seen, counted) for table, seen in zip(tables, received, strict=True)]
        both, out = OutstandingWork(tables, *each), np.empty((2, engines), np.int64)
        expected = [one.count().tolist() for one in each]
        assert both.count().tolist() == expected
        assert both.counter()().tolist() == expected
        both.count_into(out)
        assert out.tolist() == expected
        out[:] = -1
        both.counter_into(out)()
        assert out.tolist() == expected
