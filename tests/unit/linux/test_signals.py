"""Signals that ask for the end."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from dpshm.linux.signals import END_SIGNALS, EndedError, EndRequest, handling, held, raising_once


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


@pytest.mark.parametrize("signum", END_SIGNALS)
def test_only_the_first_signal_raises(signum):
    """What is undone after a signal is undone to its end, also if somebody is impatient."""
    before = signal.getsignal(signum)
    undone = []

    def ended_while_it_undoes() -> None:
        with raising_once():
            try:
                os.kill(os.getpid(), signum)
            finally:
                for another in END_SIGNALS:
                    os.kill(os.getpid(), another)
                undone.append("all of it")

    with pytest.raises(EndedError) as ended:
        ended_while_it_undoes()
    assert (ended.value.signum, ended.value.name) == (signum, signum.name)
    assert undone
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("signum", END_SIGNALS)
def test_a_held_signal_comes_later(signum):
    """A signal does not break off what is done under `held`, whichever thread it comes to, and is not lost."""
    done, before = [], signal.getsignal(signum)

    def work() -> None:
        with raising_once(), held():
            os.kill(os.getpid(), signum)
            with ThreadPoolExecutor(1) as another:  # whose thread does not block it
                unblock = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, [signum])
                another.submit(unblock).result()
            code = f"import signal; print(signal.Signals({int(signum)}) in signal.pthread_sigmask(0, []))"
            done.append(subprocess.check_output([sys.executable, "-c", code]).strip())

    with pytest.raises(EndedError, match=str(int(signum))):
        work()
    assert done == [b"True"]
    assert signal.getsignal(signum) is before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
