"""Signals that ask for the end."""

from __future__ import annotations

import gc
import os
import select
import signal

import pytest

from dpshm.linux.signals import END_SIGNALS, EndRequest, handling


@pytest.mark.parametrize("signum", END_SIGNALS)
def test_a_signal_is_noted_and_ends_a_wait(signum):
    """Guards against a wait that goes on after the signal, and against handlers that stay."""
    before = signal.getsignal(signum)
    with EndRequest() as request:
        assert request.signum == 0
        assert select.select([request], [], [], 0)[0] == []
        os.kill(os.getpid(), signum)
        assert select.select([request], [], [], 60)[0] == [request]
        assert request.signum == signum
    assert signal.getsignal(signum) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_first_signal_counts():
    """Guards against a second signal that changes how a coordinator ends: SIGTERM hands the board over."""
    with EndRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signum == signal.SIGTERM


def test_only_the_signals_asked_for_are_handled():
    """Guards against a child that takes Ctrl-C, which is its parent's to handle."""
    before = signal.getsignal(signal.SIGINT)
    with EndRequest((signal.SIGTERM,)):
        assert signal.getsignal(signal.SIGINT) is before


def test_the_garbage_collector_changes_no_handler():
    """Guards against handlers put back when an unclosed request is collected, in whichever thread that is."""
    before, wakeup_before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    request = EndRequest((signal.SIGTERM,))
    fds = request._read, request._write
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the handler no longer refers to the request
        del request
        gc.collect()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.set_wakeup_fd(wakeup_before)
        signal.signal(signal.SIGTERM, before)
        for fd in fds:
            os.close(fd)


def test_a_handler_may_raise():
    """Guards against handlers that stay after one of them raised."""

    def fail(signum: int) -> None:
        raise RuntimeError(str(signum))

    before = signal.getsignal(signal.SIGHUP)
    with pytest.raises(RuntimeError, match=str(int(signal.SIGHUP))), handling(fail):
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is before
