"""Signals that ask this process to end, noted for a loop that asks, or handed to a function.

A handler that raises may do so between any two instructions, for example when a process has been started and is
not recorded yet. So `EndRequest` notes the signal and does nothing else. Its descriptor becomes readable, so that
a wait on it ends at once: Python restarts a system call that a signal interrupts.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class EndRequest:
    """Whether a signal has asked this process to end. One at a time, made and closed in the main thread.

    One that is never closed stays in force until the process ends: the garbage collector puts no handler back.

    Attributes:
        signum: the first of the signals that came; 0 before.

    Args:
        signums: which signals count.
    """

    def __init__(self, signums: Sequence[int] = END_SIGNALS) -> None:
        self.signum = 0
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = _handle(self._note, signums)

    def _note(self, signum: int) -> None:
        self.signum = self.signum or signum

    def fileno(self) -> int:
        """A descriptor that is readable from the first signal on; of any signal that has a handler in Python."""
        return self._read

    def close(self) -> None:
        """Puts the handlers back that were there before."""
        _restore(self._before)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._read)
        os.close(self._write)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def handling(handle: Callable[[int], None], signums: Sequence[int] = END_SIGNALS) -> Iterator[None]:
    """While it is open, these signals call a function, in the main thread."""
    before = _handle(handle, signums)
    try:
        yield
    finally:
        _restore(before)


class EndedError(Exception):
    """A signal asked for the end.

    Attributes:
        signum: which.
        name: of the signal.
    """

    def __init__(self, signum: int) -> None:
        self.signum, self.name = signum, signal.Signals(signum).name
        super().__init__(f"{self.name} (signal {signum})")


@contextmanager
def raising_once() -> Iterator[None]:
    """While it is open, the first signal that asks for the end raises `EndedError`.

    Those after it do nothing, so what is undone on the way out is undone to its end.
    """
    came: list[int] = []

    def handle(signum: int) -> None:
        came.append(signum)
        if len(came) == 1:
            raise EndedError(signum)

    with handling(handle):
        yield


@contextmanager
def held(signums: Sequence[int] = END_SIGNALS) -> Iterator[None]:
    """While it is open, these signals wait. Children that are started meanwhile begin with them blocked.

    In another thread than the main one, which alone may set handlers, only the latter holds.
    """
    came: list[int] = []
    # A mask is of one thread. The system gives the signal to another one, and Python calls the handler in this.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signums)
    before = _handle(came.append, signums) if threading.current_thread() is threading.main_thread() else {}
    try:
        yield
    finally:
        _restore(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if came:
            signal.raise_signal(came[0])


def _handle(handle: Callable[[int], None], signums: Sequence[int]) -> dict[int, Any]:
    """Has these signals call a function; the handlers that were there before, by signal."""
    return {signum: signal.signal(signum, lambda number, _: handle(number)) for signum in signums}


def _restore(before: dict[int, Any]) -> None:
    for signum, handler in before.items():
        signal.signal(signum, handler)
