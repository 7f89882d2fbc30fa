"""How long a caller lets a call wait."""

from __future__ import annotations

import math
import select
import socket
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from dpshm import SettingError
from dpshm.linux.waits import LONGEST_S, bounded, deadline, seconds


@pytest.mark.parametrize(
    "value", [2, 2.0, np.float32(2), np.int8(2), np.array(2.0), Decimal(2), Fraction(4, 2)], ids=repr
)
def test_numbers_of_any_kind(value):
    """A number of numpy or of a configuration's parser is a time, too."""
    assert seconds(value) == bounded(value) == 2.0
    assert seconds(value).__class__ is float


@pytest.mark.parametrize("value", [math.nan, np.float64("nan"), "2", b"2", None, [2], 1j, Decimal("nan")])
def test_what_is_no_number(value):
    """NaN is refused: a wait that compares with it never ends. So is a text."""
    with pytest.raises(SettingError, match=r"start_timeout_s is .*: give a number of seconds"):
        seconds(value, "start_timeout_s")


def test_the_limits():
    """Below 0 is no wait; what no wait of the system takes is for ever, or as long as it takes."""
    assert [seconds(value) for value in (-1, -math.inf, -(10**400))] == [0.0] * 3
    assert [seconds(value) for value in (math.inf, 1e300, 10**400)] == [math.inf] * 3
    assert bounded(math.inf) == LONGEST_S
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as writable:
        ready = select.poll()
        ready.register(writable, select.POLLOUT)
        assert ready.poll(LONGEST_S * 1000)  # takes it
    assert deadline(None) == deadline(math.inf) == math.inf
    assert deadline(0) <= time.monotonic()
