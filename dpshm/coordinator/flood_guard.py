"""How much this process has grown: the last line against peers that pile up what libzmq keeps without a limit.

Only for a process that is a coordinator and nothing else; in any other the growth may be somebody else's.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from contextlib import suppress

_PAGE = os.sysconf("SC_PAGE_SIZE")


class MemoryGuard:
    """Compares the resident memory with what it was when this was made, or last settled.

    Args:
        limit_bytes: more than so much is too much.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        self._base = self._resident()

    def bytes(self) -> int:
        """By how much it has grown."""
        return self._resident() - self._base

    def is_too_much(self) -> bool:
        """Whether it has grown by more than the limit."""
        return self.bytes() > self._limit

    def settle(self) -> None:
        """Gives what was freed back to the system, and counts from what is left."""
        with suppress(AttributeError, OSError):  # glibc's alone
            ctypes.CDLL(None).malloc_trim(0)
        self._base = self._resident()

    def _resident(self) -> int:
        return int(os.pread(self._fd, 128, 0).split()[1]) * _PAGE
