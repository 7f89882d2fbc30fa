"""Signals that ask the demo to end. Each wait checks for one, and raises while no operation is half done."""

from __future__ import annotations

from dpshm.linux.signals import EndedError, EndRequest


class StopFlag(EndRequest):
    """Whether a signal has asked the demo to end, and which."""

    def check(self) -> None:
        """Raises `EndedError` if one has."""
        if self.signum:
            raise EndedError(self.signum)
