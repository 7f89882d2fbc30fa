"""Tests of `dpshm.frontend.row`: bookings that no signal and no collector can split."""

from __future__ import annotations

import dis

import pytest

from dpshm.frontend.row import FrontendRow


def interruptible(function):
    """The instructions after which CPython may run a signal handler or the collector."""
    names = [i.opname for i in dis.get_instructions(function)]
    return [n for n in names if any(part in n for part in ("CALL", "JUMP_BACKWARD", "BUILD_", "SEND", "YIELD"))]


@pytest.mark.parametrize("name", ["book", "end"])
def test_nothing_comes_between_a_load_and_its_store(name):
    """Guards against a call or a loop in a booking: a request that ends within it would leave wrong sums."""
    assert interruptible(getattr(FrontendRow, name)) == []


def test_the_check_of_instructions_finds_calls_and_loops():
    """Guards against names of instructions that another Python does not use."""

    def call(x):
        return max(x, 1)

    def loop(x):
        while x:
            x -= 1

    assert interruptible(call)
    assert interruptible(loop)
