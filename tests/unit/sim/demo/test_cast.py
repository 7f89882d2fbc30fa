"""Tests of `dpshm.sim.demo.cast`: what a front-end's successor sends."""

from __future__ import annotations

from dpshm.sim.demo.cast import arrivals_from

SHARE = [(0.0, 1, 1, ()), (2.0, 2, 2, (5,)), (7.0, 3, 3, ())]


def test_a_successor_sends_the_arrivals_to_come():
    """Guards against a front-end that was killed whose successor repeats its requests, or sends them late."""
    assert arrivals_from(SHARE, 1.5, 0.0) == [(0.5, 2, 2, (5,)), (5.5, 3, 3, ())]
    assert arrivals_from(SHARE, 8.0, 0.0) == []


def test_arrivals_that_repeat_go_on_where_they_are():
    """Guards against a successor whose period begins anew, so that front-ends of a kept demo drift apart."""
    left = [(0.5, 2, 2, (5,)), (5.5, 3, 3, ()), (8.5, 1, 1, ())]
    assert arrivals_from(SHARE, 1.5, 10.0) == arrivals_from(SHARE, 31.5, 10.0) == left
