"""Running out of file descriptors: a clear error, and no abort of libzmq where one can be prevented.

libzmq calls abort() if it cannot make the epoll of its I/O thread. So before a context gets its first socket,
`check_spare` tests whether enough descriptors are left. Any other call that reaches the limit raises one error,
which names the limit (`explained`).

libzmq also calls abort() if it cannot accept a connection to an ipc socket, and no test beforehand can prevent it.
A coordinator of 400 ranks, with two connections and a pidfd each, needs more than the usual 1024 descriptors. So
the coordinator's own processes raise their limit as far as they may (`raise_limit`). A coordinator that is aborted
all the same is handled as one that was killed.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from dpshm.errors import TooManyFiles

CONTEXT_FDS = 8
"""What a context and its first socket open, and two more: measured with libzmq 4.3.5."""


def check_spare() -> None:
    """Raises OSError (EMFILE) unless this process may open `CONTEXT_FDS` descriptors more."""
    opened: list[int] = []
    try:
        while len(opened) < CONTEXT_FDS:
            opened.append(os.eventfd(0, os.EFD_CLOEXEC))
    finally:
        for fd in opened:
            os.close(fd)


def raise_limit() -> None:
    """Raises the soft limit of descriptors to the hard one. For processes that dpshm starts itself."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def explained() -> Iterator[None]:
    """Turns the system's "too many open files", wherever it comes from, into `TooManyFiles`."""
    try:
        yield
    except Exception as e:
        numbers = {getattr(error, "errno", None) for error in (e, e.__cause__)}
        if not numbers & {errno.EMFILE, errno.ENFILE}:
            raise
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise TooManyFiles(
            f"{e}: no file descriptor is left, of {limit} that this process may have: raise the limit (ulimit -n, "
            "systemd's LimitNOFILE), or find what keeps files open: ls -l /proc/PID/fd"
        ) from None
