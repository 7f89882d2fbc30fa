"""Tests of `dpshm.linux.uninterrupted`, with real signals."""

from __future__ import annotations

import gc
import signal
import threading
import weakref

import pytest

from dpshm.linux.uninterrupted import uninterrupted
from tests.support import count_threads


class Interrupted(Exception):
    """Raised by this module's signal handler."""


@pytest.fixture
def interrupts():
    """SIGUSR1 raises here what Ctrl-C raises elsewhere."""

    def raise_it(*_):
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, raise_it)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_a_result_is_returned():
    """Guards against work that is not done in a thread of its own, where signal handlers do not run."""
    threads = count_threads()
    worker = uninterrupted(threading.current_thread, pytest.fail)
    assert worker is not threading.current_thread()
    assert not worker.is_alive()
    assert count_threads() <= threads


def test_an_error_is_raised_and_leaves_nothing():
    """Guards against an error that is lost, and one whose traceback keeps memory until the collector runs."""

    class Held:
        pass

    kept = []

    def fail():
        held = Held()
        kept.append(weakref.ref(held))
        raise ZeroDivisionError

    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError):
            uninterrupted(fail, pytest.fail)
        assert kept[0]() is None
    finally:
        gc.enable()


def test_what_was_made_is_undone_after_an_interrupt(interrupts):
    """Guards against a Ctrl-C after which what was being opened stays open, though nothing refers to it."""
    main, undone = threading.main_thread().ident, []

    def make():
        signal.pthread_kill(main, signal.SIGUSR1)
        return "made"

    with pytest.raises(Interrupted):
        uninterrupted(make, undone.append)
    assert undone == ["made"]


def test_an_interrupt_while_it_fails(interrupts):
    """Guards against an undo of nothing."""
    main = threading.main_thread().ident

    def make():
        signal.pthread_kill(main, signal.SIGUSR1)
        raise ZeroDivisionError

    with pytest.raises((Interrupted, ZeroDivisionError)):
        uninterrupted(make, pytest.fail)
