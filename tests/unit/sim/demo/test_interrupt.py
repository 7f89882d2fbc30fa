"""Signals that ask for the end."""

from __future__ import annotations

import os
import signal

import pytest

from dpshm.linux.signals import EndedError
from dpshm.sim.demo.interrupt import StopFlag


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_sets_the_flag_and_nothing_else(signum):
    """Guards against an exception in the middle of a start, and against handlers that stay."""
    before = signal.getsignal(signum)
    with StopFlag() as flag:
        flag.check()
        os.kill(os.getpid(), signum)
        with pytest.raises(EndedError, match=signum.name):
            flag.check()
    assert signal.getsignal(signum) is before
