"""Runs code that no signal handler interrupts, whichever thread asks for it.

Python runs signal handlers in the main thread, after any call that the thread makes. A handler that raises, as
Ctrl-C's does, may do so after a descriptor was opened and before a variable holds it; it then stays open. So
code that opens what has to be closed runs in a thread of its own, while the caller waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")
START_TIMEOUT_S = 0.5


def uninterrupted(make: Callable[[], T], undo: Callable[[T], None]) -> T:
    """Calls `make` in a new thread and returns its result.

    An exception that a signal handler raises meanwhile in the calling thread is raised once `make` has ended and
    `undo` has been called with its result.

    Raises:
        BaseException: the error that `make` raised, or a signal handler in this thread.
    """
    made: Future[T] = Future()
    thread = threading.Thread(target=_run, args=(made, make), name="dpshm-start", daemon=True)
    try:
        thread.start()
        result = made.result()
        thread.join()
    except BaseException:
        # A thread that has not begun finds that its work was cancelled. Work that has begun is waited for.
        if not made.cancel():
            wait((made,))
            if made.exception() is None:
                undo(made.result())
        _join(thread)
        raise
    else:
        return result
    finally:
        del made  # the error's traceback refers to this frame, and the future to the error


def _run(made: Future[T], make: Callable[[], T]) -> None:
    try:
        if made.set_running_or_notify_cancel():
            made.set_result(make())
    except BaseException as e:
        made.set_exception(e)
    finally:
        del made  # as above


def _join(thread: threading.Thread) -> None:
    """Waits for a thread whose `start` may have been interrupted before the thread began."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while thread.ident is None and time.monotonic() < deadline:
        time.sleep(0.001)
    if thread.ident is not None:
        thread.join()
