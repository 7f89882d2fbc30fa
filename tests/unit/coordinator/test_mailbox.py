"""Tests of `dpshm.coordinator.mailbox`, with a real thread that waits for it."""

from __future__ import annotations

import os
import select
import threading

import pytest

from dpshm import HandleClosed
from dpshm.coordinator.mailbox import Mailbox
from tests.support import count_fds, wait_until


class Worker(threading.Thread):
    """A thread that does nothing but receive."""

    def __init__(self, mailbox):
        super().__init__(daemon=True)
        self.mailbox = mailbox
        self.turns = 0

    def run(self):
        poller = select.poll()
        poller.register(self.mailbox.fd, select.POLLIN)
        while not self.mailbox.end_asked:
            poller.poll()
            self.mailbox.receive()
            self.turns += 1


@pytest.fixture
def mailbox():
    """A mailbox that nothing reads."""
    made = Mailbox("the test")
    yield made
    made.close()


@pytest.fixture
def worker(mailbox):
    """A thread that reads it."""
    thread = Worker(mailbox)
    thread.start()
    yield thread
    mailbox.end()
    thread.join()


def test_calls_are_made_in_the_thread_in_order(mailbox, worker):
    """Guards against a call in the caller's thread, which would use sockets that it must not."""
    seen = []
    for i in range(3):
        mailbox.call(lambda i=i: seen.append((i, threading.current_thread())))
    assert seen == [(0, worker), (1, worker), (2, worker)]


def test_an_error_is_the_callers(mailbox, worker):
    """Guards against an error that ends the thread, or that its caller never hears of."""
    with pytest.raises(ZeroDivisionError):
        mailbox.call(lambda: 1 // 0)
    mailbox.call(lambda: None)
    assert worker.is_alive()


def test_a_notification_ends_a_wait(mailbox, worker):
    """Guards against a thread that sleeps through a notification; two of them may be one."""
    for _ in range(3):
        turns = worker.turns
        mailbox.notify()
        mailbox.notify()
        wait_until(lambda turns=turns: worker.turns > turns)


def test_a_call_that_is_given_up_is_not_made_later(mailbox):
    """Guards against a call that raised and changes something all the same."""
    seen = []
    with pytest.raises(TimeoutError, match="the test did not answer"):
        mailbox.call(lambda: seen.append(1), timeout_s=0.01)
    mailbox.receive()
    assert seen == []


def test_a_call_that_has_begun_is_waited_for(mailbox, worker):
    """Guards against a call that raises a timeout although it takes effect."""
    begun, release, results = threading.Event(), threading.Event(), []

    def slow():
        begun.set()
        release.wait(30)
        results.append("done")

    def call():
        mailbox.call(slow, timeout_s=0.01)
        results.append("returned")

    caller = threading.Thread(target=call)
    caller.start()
    begun.wait(30)
    release.set()
    caller.join()
    assert results == ["done", "returned"]


def test_after_close_notifications_are_lost_and_calls_refused(mailbox):
    """Guards against a late notification that writes to a descriptor which is another file's by now."""
    mailbox.close()
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK)  # one of them takes the number
    mailbox.notify()
    mailbox.end()
    with pytest.raises(BlockingIOError):
        os.read(read_fd, 8)
    os.close(read_fd)
    os.close(write_fd)
    with pytest.raises(HandleClosed, match="the test is closed"):
        mailbox.call(lambda: None)


def test_close_refuses_the_calls_that_wait(mailbox):
    """Guards against a caller that waits for its whole timeout for a thread that has ended."""
    errors = []

    def call():
        try:
            mailbox.call(lambda: None, timeout_s=30)
        except HandleClosed as e:
            errors.append(e)

    caller = threading.Thread(target=call)
    caller.start()
    poller = select.poll()
    poller.register(mailbox.fd, select.POLLIN)
    poller.poll()  # the call is in the queue
    mailbox.close()
    caller.join(60)
    assert len(errors) == 1


def test_no_descriptor_is_left():
    """Guards against a descriptor for each mailbox that is dropped, or closed twice."""
    before = count_fds()
    for _ in range(20):
        Mailbox("dropped")
        closed = Mailbox("closed")
        closed.close()
        closed.close()
    assert count_fds() <= before
