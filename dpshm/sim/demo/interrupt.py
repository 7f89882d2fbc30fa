"""Signals that ask for the end: a flag that is looked at, not an exception that may come anywhere.

While processes are being started and ended, an exception out of a signal handler could leave one of them
unrecorded. So the handlers here only set a flag, and whoever waits looks at it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """A signal ended the demo; everything it had started is gone."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopFlag:
    """Whether a signal has asked the demo to end, and which."""

    signum = 0

    def check(self) -> None:
        """Raises `Interrupted` if one has."""
        if self.signum:
            raise Interrupted(self.signum)


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """While it is open, SIGINT, SIGTERM and SIGHUP set the flag and do nothing else."""
    flag = StopFlag()

    def handle(signum: int, _: FrameType | None) -> None:
        flag.signum = signum

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield flag
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
