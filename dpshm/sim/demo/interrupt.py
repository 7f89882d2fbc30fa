"""Signals that ask the demo to end. Each wait checks for one, and raises while no operation is half done."""

from __future__ import annotations

import signal

from dpshm.linux.signals import EndRequest


class Interrupted(Exception):
    """A signal ended the demo; all its processes and files are gone."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopFlag(EndRequest):
    """Whether a signal has asked the demo to end, and which."""

    def check(self) -> None:
        """Raises `Interrupted` if one has."""
        if self.signum:
            raise Interrupted(self.signum)
