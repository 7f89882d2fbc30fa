"""A process as a server's monitor sees it: the part of `multiprocessing.Process` that it uses."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import weakref
from contextlib import suppress


class Process:
    """A child process with the part of `multiprocessing.Process` that a server's monitor uses.

    Attributes:
        name: for messages.
        pid: the process id.
        sentinel: a descriptor that is readable once the process has ended (a pidfd); for
            ``multiprocessing.connection.wait``.
    """

    def __init__(
        self, popen: subprocess.Popen[bytes], name: str, end_signal: signal.Signals = signal.SIGTERM
    ) -> None:
        self._popen = popen
        self._end_signal = end_signal
        self.name = name
        self.pid = popen.pid
        self.sentinel = os.pidfd_open(popen.pid)
        self._close_sentinel = weakref.finalize(self, os.close, self.sentinel)

    @property
    def exitcode(self) -> int | None:
        """None while the process runs; else its exit status, or minus the signal that ended it."""
        return self._popen.poll()

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._popen.poll() is None

    def terminate(self) -> None:
        """Asks the process to end."""
        self._popen.send_signal(self._end_signal)

    def kill(self) -> None:
        """Ends the process (SIGKILL)."""
        self._popen.kill()

    def join(self, timeout: float | None = None) -> None:
        """Waits until the process has ended, for `timeout` seconds at most."""
        try:
            self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            return

    def __repr__(self) -> str:
        return f"<Process name={self.name!r} pid={self.pid} exitcode={self.exitcode}>"


class Detached(Process):
    """The same of a process that is no child of this one: it stays when this one is killed with its children."""

    def __init__(self, pid: int, name: str) -> None:
        self.name, self.pid = name, pid
        self.sentinel = os.pidfd_open(pid)
        self._close_sentinel = weakref.finalize(self, os.close, self.sentinel)

    @property
    def exitcode(self) -> int | None:
        """None while the process runs; then 0: how it ended, only its parent knows."""
        return None if self.is_alive() else 0

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return not self._ended(0)

    def terminate(self) -> None:
        """Asks the process to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the process (SIGKILL)."""
        self._send(signal.SIGKILL)

    def join(self, timeout: float | None = None) -> None:
        """Waits until the process has ended, for `timeout` seconds at most."""
        self._ended(None if timeout is None else timeout * 1000)

    def _ended(self, timeout_ms: float | None) -> bool:
        ended = select.poll()
        ended.register(self.sentinel, select.POLLIN)
        return bool(ended.poll(timeout_ms))

    def _send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.sentinel, number)
