"""A thread's mailbox: other threads notify the thread, have it call a function, and ask it to end.

The thread waits for the descriptor beside what else it waits for. Every method may be called from any thread and
after `close`: a late notification is lost, a late call raises.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from dpshm.errors import HandleClosed

CALL_TIMEOUT_S = 5.0


class Mailbox:
    """Notifications and calls for one thread.

    Args:
        owner: names the thread's owner in errors.

    Attributes:
        fd: an eventfd, readable while there is something to `receive`; never read elsewhere.

    Raises:
        OSError: no file descriptor is left.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._calls: queue.SimpleQueue[tuple[Future[None], Callable[[], None]]] = queue.SimpleQueue()
        self._end_asked = False
        self._lock = threading.Lock()
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._close_fd = weakref.finalize(self, os.close, self.fd)
        self._close_fd.atexit = False

    # From other threads.

    def notify(self) -> None:
        """Ends the thread's present wait."""
        with self._lock:  # `close` may run in another thread, and the number then means another file
            if self._close_fd.alive:
                os.eventfd_write(self.fd, 1)

    def call(self, function: Callable[[], None], timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Has the thread call a function, and waits for it; raises what the function raises.

        Raises:
            HandleClosed: the thread has ended, or was asked to.
            TimeoutError: the thread did not get to it in time, and will not call it.
        """
        if self._end_asked:
            raise self._closed()
        done: Future[None] = Future()
        self._calls.put((done, function))
        self.notify()
        try:
            done.result(timeout_s)
        except TimeoutError:
            if done.cancel():
                raise TimeoutError(f"{self._owner} did not answer within {timeout_s:g} s") from None
            done.result()  # it has begun

    def end(self) -> None:
        """Asks the thread to end."""
        self._end_asked = True
        self.notify()

    def close(self) -> None:
        """Closes the descriptor and refuses calls that nothing received. For when the thread has ended."""
        self._end_asked = True
        with self._lock:
            self._close_fd()
        self._each_call(lambda done, _: done.set_exception(self._closed()))

    # In the thread.

    @property
    def end_asked(self) -> bool:
        """Whether the thread is to end."""
        return self._end_asked

    def receive(self) -> None:
        """Makes the calls that have come, and waits for none."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        self._each_call(_make)

    def _each_call(self, handle: Callable[[Future[None], Callable[[], None]], None]) -> None:
        with suppress(queue.Empty):
            while True:
                done, function = self._calls.get_nowait()
                if done.set_running_or_notify_cancel():
                    handle(done, function)

    def _closed(self) -> HandleClosed:
        return HandleClosed(f"{self._owner} is closed")


def _make(done: Future[None], function: Callable[[], None]) -> None:
    try:
        function()
    except Exception as e:
        done.set_exception(e)
    else:
        done.set_result(None)
